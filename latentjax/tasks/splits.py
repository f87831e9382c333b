"""Splits of generated tasks that are disjoint by construction, whatever the seeds and the sizes asked for.

A problem's split is a function of its canonical form only: a stable 64-bit hash modulo 10 sends a tenth of all problems
to the test split, a tenth to the validation split and the rest to training."""

import hashlib
import operator
from collections.abc import Callable, Collection, Iterable

import numpy as np

from latentjax.tasks.base import Example

_BLOCK = 1024  # problems drawn at once; fixed, so that a longer draw begins with the shorter one


def split_of_hash(value: int) -> str:
    """The split of a problem with the 64-bit hash `value`: "test", "valid" or "train" (1 : 1 : 8)."""
    return {0: "test", 1: "valid"}.get(int(value) % 10, "train")


def split_of_text(question: str) -> str:
    """The split of the problem with the canonical text `question`."""
    return split_of_hash(int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little"))


def check_count(split: str, count: int | None) -> int:
    """`count` of a generated split. Raises ValueError if it is missing or not positive."""
    if count is None or count < 1:
        raise ValueError(f"count={count!r}: the split {split!r} is generated, say how many problems (at least 1)")
    return count


def check_fields(task: object, **least: int) -> None:
    """Raises ValueError naming the first integer field of `task` that is below its least value."""
    for field, minimum in least.items():
        value = getattr(task, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{type(task).__name__}.{field}={value!r}: must be an integer of at least {minimum}")


def split_rng(split: str, seed: int) -> np.random.Generator:
    """The generator of random numbers of one split at one seed."""
    return np.random.default_rng([seed, int.from_bytes(split.encode(), "little")])


def draw(
    split: str,
    count: int | None,
    seed: int,
    block: Callable[[np.random.Generator, int], Iterable[Example]],
    *,
    canonical: Callable[[Example], str] = operator.attrgetter("question"),
    exclude: Collection[str] = frozenset(),
) -> list[Example]:
    """The first `count` problems of `split` that `block(rng, n)` (n problems, any split) yields.

    Two problems are the same if their `canonical` forms are equal; those in `exclude` are left out. Problems of "valid"
    and "test" are distinct; "train" keeps repeats, as fresh draws do. Raises ValueError if the split has fewer than
    `count` problems, judged by draws after which a missed problem (as likely as any other) has probability below
    1e-8."""
    count = check_count(split, count)
    rng = split_rng(split, seed)
    found: list[Example] = []
    seen = set(exclude)
    since = 0  # draws since the last new problem
    while len(found) < count:
        for example in block(rng, _BLOCK):
            since += 1
            form = canonical(example)
            if form in seen or split_of_text(form) != split:
                continue
            if split != "train":
                seen.add(form)
            found.append(example)
            since = 0
        # If one more problem existed, there would be about n = 10 (found + 1) in all, besides the excluded ones, and
        # (1 - 1/n)^(20 n) < 1e-8.
        if since > 20 * (10 * (len(found) + 50) + len(exclude)):
            raise ValueError(
                f"count={count}: the split {split!r} has only {len(found)} distinct problems; ask for fewer"
            )
    return found[:count]
