"""Statistics against their definitions: roots of the quadratic, enumeration of subsets, scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from latentjax.metrics import mcnemar, mean_and_error, mean_interval, pass_at_k, wilson


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (7, 50), (25, 50), (50, 50), (913, 1000)])
def test_wilson_bounds_are_the_roots_of_the_score_equation(correct, n, confidence):
    z = special.ndtri(0.5 + confidence / 2)
    share = correct / n
    # (share - p)^2 = z^2 p (1 - p) / n, ordered by powers of p
    roots = np.sort(np.roots([1 + z**2 / n, -2 * share - z**2 / n, share**2]).real)
    np.testing.assert_allclose(wilson(correct, n, confidence), roots, atol=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 20), (3, 20), (20, 20), (128, 1319)])
def test_wilson_agrees_with_scipy(correct, n):
    interval = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(correct, n), (interval.low, interval.high), atol=1e-12)


def test_wilson_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for truth in (0.05, 0.3, 0.5, 0.9):
        draws = rng.binomial(200, truth, size=4000)
        bounds = np.array([wilson(int(c), 200) for c in draws])
        covered = np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
        # The coverage of a discrete interval oscillates around its level by about a percent.
        assert 0.93 < covered < 0.975, (truth, covered)


def test_wilson_reaches_exactly_zero_and_one():
    assert wilson(0, 17)[0] == 0.0
    assert wilson(17, 17)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1, 0), "n=0"), ((-1, 5), "correct=-1"), ((6, 5), "correct=6"), ((1, 5, 1.0), "confidence=1.0")],
)
def test_wilson_names_a_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        wilson(*arguments)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            expected = np.mean([min(subset) < c for subset in subsets])  # samples 0..c-1 are the right ones
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (n, c, k)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(1)
    truth, n, k = 0.2, 10, 4
    estimate = np.mean([pass_at_k(n, int(c), k) for c in rng.binomial(n, truth, size=20000)])
    assert estimate == pytest.approx(1 - (1 - truth) ** k, abs=0.01)


@pytest.mark.parametrize(("arguments", "named"), [((3, 1, 4), "n=3"), ((3, 4, 2), "c=4"), ((3, 1, 0), "k=0")])
def test_pass_at_k_names_a_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        pass_at_k(*arguments)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 12)])
def test_mcnemar_is_a_binomial_test_on_the_flips(only_first, only_second):
    first = [True] * only_first + [False] * only_second + [True] * 7 + [False] * 3
    second = [False] * only_first + [True] * only_second + [True] * 7 + [False] * 3
    flips = only_first + only_second
    expected = stats.binomtest(only_first, flips).pvalue if flips else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_needs_the_same_problems():
    with pytest.raises(ValueError, match="2 problems"):
        mcnemar([True, False], [True])


def test_mean_and_error_over_seeds():
    values = [1.0, 0.913, 1.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert math.isnan(mean_and_error([0.5])[1])
    with pytest.raises(ValueError, match="values is empty"):
        mean_and_error([])


def test_interval_of_a_mean_agrees_with_scipy_inside_the_unit_interval():
    values = np.random.default_rng(0).uniform(size=40)
    expected = stats.norm.interval(0.9, values.mean(), stats.sem(values))
    np.testing.assert_allclose(mean_interval(values.tolist(), 0.9), expected, atol=1e-12)
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)  # cut off


def test_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for shape in ((0.5, 0.5), (2.0, 5.0)):
        draws = rng.beta(*shape, size=(2000, 60))
        bounds = np.array([mean_interval(row.tolist()) for row in draws])
        truth = shape[0] / sum(shape)
        assert 0.92 < np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])) < 0.97


def test_interval_of_a_mean_where_nothing_varies_is_not_empty():
    assert mean_interval([0.0] * 9) == wilson(0, 9)
    assert mean_interval([1.0] * 9) == wilson(9, 9)
    assert mean_interval([0.3]) == (0.0, 1.0)


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [-0.1], [math.nan]])
def test_interval_of_a_mean_refuses_what_is_no_share(values):
    with pytest.raises(ValueError, match="values"):
        mean_interval(values)
