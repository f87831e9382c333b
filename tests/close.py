"""The one comparison of arrays in the tests."""

from typing import Any

import chex
import jax
import numpy as np


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Fail unless the trees have one structure and, for every array, max|a - b| <= tolerance * max|b|.

    Both sides must be finite: a NaN would compare as neither near nor far."""
    chex.assert_trees_all_equal_structs(actual, expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
        assert np.isfinite(a).all(), f"{name}: not finite"
        assert np.isfinite(b).all(), f"{name}: the expected values are not finite"
        if b.size:
            difference, scale = np.abs(a - b).max(), np.abs(b).max()
            assert difference <= tolerance * scale, f"{name}: max|a-b| = {difference:.3g}, max|b| = {scale:.3g}"
