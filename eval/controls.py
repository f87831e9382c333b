"""Are the thoughts used? Thoughts zeroed, thoughts swapped between problems, and what each thought spells.

Each control changes the thoughts at commit, before they enter the cache. N problems, K thoughts, W width of a thought
(here the model's width).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.table import Table

from eval.evaluate import Evaluation
from eval.report import interval_text, p_text, percent
from latentjax.backbone import decoder
from latentjax.methods.base import Method
from latentjax.metrics import mcnemar, wilson
from latentjax.rollout import Intervention
from latentjax.tasks.base import Example, Task
from latentjax.tokenizers import Codec

Evaluate = Callable[[Intervention | None], Evaluation]


@dataclasses.dataclass(frozen=True)
class Share:
    """A proportion with its 95% Wilson interval. `n` counts only problems to which the question applies."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.count, self.n)

    def record(self) -> dict[str, Any]:
        low, high = self.interval
        return {"count": self.count, "n": self.n, "share": self.value, "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class Controls:
    """What became of the answers, on the same problems as `clean`."""

    clean: Evaluation
    zeroed: Evaluation
    swapped: Evaluation
    donor: Share  # swapped problems answered with the donor's answer, among those whose donor has another answer
    spelled: tuple[Share, ...]  # problems whose i-th thought is nearest to the token of reference step i

    def record(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        evaluations = {name: getattr(self, name).figures() for name in ("clean", "zeroed", "swapped")}
        return {**evaluations, "donor": self.donor.record(), "spelled": [share.record() for share in self.spelled]}


def run_controls(
    method: Method, params: Any, task: Task, codec: Codec, examples: Sequence[Example], evaluate: Evaluate
) -> Controls:
    """Evaluate clean, zeroed and swapped thoughts on `examples`, at least two.

    Args:
        evaluate: evaluates the examples under an intervention and keeps the thoughts (`Evaluation.vectors`).
    """
    if len(examples) < 2:
        raise ValueError(f"examples: there are {len(examples)}, swapping thoughts needs at least 2")
    clean = evaluate(None)
    assert clean.vectors is not None, "`evaluate` must keep the thoughts"
    zeroed = evaluate(replace_thoughts(np.zeros_like(clean.vectors)))
    # The donor of problem i is problem i - 1.
    swapped = evaluate(replace_thoughts(np.roll(clean.vectors, 1, axis=0)))
    donors = [examples[i - 1] for i in range(len(examples))]
    return Controls(
        clean, zeroed, swapped, donor_share(task, examples, donors, swapped),
        spelled_shares(method, params, codec, examples, clean.vectors),
    )  # fmt: skip


def replace_thoughts(vectors: Float[np.ndarray, "N K W"]) -> Intervention:
    """Every thought becomes the given vector."""
    return Intervention(where=np.ones(vectors.shape[:2], bool), value=vectors, add=np.zeros_like(vectors))


def donor_share(task: Task, examples: Sequence[Example], donors: Sequence[Example], swapped: Evaluation) -> Share:
    """How often the answer is the one of the problem that the thoughts came from.

    Only problems whose donor has another answer count: on the others the two cannot be told apart."""
    applicable = [
        task.verify(donor, prediction.text).correct
        for example, donor, prediction in zip(examples, donors, swapped.predictions, strict=True)
        if donor.answer != example.answer
    ]
    if not applicable:
        raise ValueError("examples: all have the same answer, so that no swap can be told from none")
    return Share(sum(applicable), len(applicable))


def spelled_shares(
    method: Method, params: Any, codec: Codec, examples: Sequence[Example], vectors: Float[np.ndarray, "N K W"]
) -> tuple[Share, ...]:
    """For thought i, how often the head reads the token of reference step i from it: argmax of z_i E^T.

    The thoughts are post-norm states, so no norm is applied again. Steps must be single tokens."""
    steps = np.array([[ids for (ids,) in codec.steps(example)] for example in examples])  # [N, steps]
    logits = decoder.head(method.backbone, params["backbone"], jnp.asarray(vectors))
    read = np.asarray(logits.argmax(axis=-1))  # [N, K]
    shared = min(steps.shape[1], read.shape[1])
    hits = (read[:, :shared] == steps[:, :shared]).sum(axis=0)
    return tuple(Share(int(hit), len(examples)) for hit in hits)


def controls_table(controls: Controls, name: str) -> Table:
    """What the controls did, a line each."""
    table = Table(title=f"{name}: are the thoughts used?", caption="McNemar's exact test against the clean thoughts")
    table.add_column("thoughts")
    for column in ("n", "accuracy %", "interval", "McNemar p"):
        table.add_column(column, justify="right")
    clean = [p.correct for p in controls.clean.predictions]
    for label, e in (("clean", controls.clean), ("zeroed", controls.zeroed), ("swapped", controls.swapped)):
        p = "-" if label == "clean" else p_text(mcnemar(clean, [p.correct for p in e.predictions]))
        table.add_row(label, str(e.n), percent(e.accuracy), interval_text(e.low, e.high), p)
    shares = {"swapped: the donor's answer": controls.donor}
    shares |= {f"thought {i} spells step {i}": share for i, share in enumerate(controls.spelled, start=1)}
    for label, share in shares.items():
        table.add_row(label, str(share.n), percent(share.value), interval_text(*share.interval), "")
    return table
