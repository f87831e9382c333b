"""Statistics of evaluations: intervals, pass@k, paired tests, means over seeds.

Everything here takes counts or plain arrays, so that a figure can be recomputed from a saved result file.
"""

import math
import statistics
from collections.abc import Sequence


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209).

    The two bounds are the proportions p at which the observed one lies exactly z standard errors away: the roots of
    (correct/n - p)^2 = z^2 p (1 - p) / n.

    Args:
        correct: successes, 0 <= correct <= n.
        n: trials, at least 1.
        confidence: two-sided coverage in (0, 1).

    Returns:
        (low, high), fractions in [0, 1].
    """
    _check_count("n", n, 1)
    _check_count("correct", correct, 0, n)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence}: must lie strictly between 0 and 1")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share, shrink = correct / n, 1.0 / (1.0 + z * z / n)
    centre = shrink * (share + z * z / (2.0 * n))
    half = shrink * z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    # At 0 and n successes a bound is exactly 0 or 1; rounding must not move it.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k): the share of the size-k subsets of n samples that hold one of the c right ones. The
    plug-in 1 - (1 - c/n)^k is biased. A benchmark's figure is the mean over its problems.

    Args:
        n: samples drawn, at least k.
        c: how many of them are right.
        k: size of the budget, at least 1.
    """
    _check_count("k", k, 1)
    _check_count("n", n, k)
    _check_count("c", c, 0, n)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over problems of quantities in [0, 1], such as estimates of pass@k: what other problems of the
    same kind would give.

    The mean plus and minus z standard errors s / sqrt(n), cut off at 0 and 1. Where all problems have 0 or all have 1, s = 0
    says nothing, and Wilson's interval takes its place. A single problem with another value gives [0, 1].

    Args:
        values: one a problem, at least one.
        confidence: two-sided coverage in (0, 1).

    Returns:
        (low, high), fractions in [0, 1].
    """
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"values={list(values)[:8]}...: must lie in [0, 1]")
    mean, error = mean_and_error(values)
    if mean in (0.0, 1.0):
        return wilson(int(mean) * len(values), len(values), confidence)
    if len(values) == 1:
        return 0.0, 1.0
    half = statistics.NormalDist().inv_cdf(0.5 + confidence / 2.0) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test that two systems are equally good (McNemar 1947, Psychometrika 12).

    Only problems that exactly one system solves count. If the systems were equally good, each of these would fall to
    either side like a fair coin, so p = min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c))).

    Args:
        first: correctness of one system, problem by problem.
        second: correctness of the other one on the same problems in the same order.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} problems and second {len(second)}: the test needs the same problems")
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    flips = only_first + only_second
    tail = sum(math.comb(flips, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**flips)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error s / sqrt(n), n - 1 degrees of freedom in s (nan for a single value)."""
    if not values:
        raise ValueError("values is empty: a mean needs at least one value")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value}: must be at least {low}" + ("" if high is None else f" and at most {high}"))
