"""Floating-point operations of a traced program.

XLA's own cost analysis counts the body of a loop once, however often it runs; thoughts, microbatches and often layers are
loops here. So the matrix products are counted in the jaxpr, where loops have their lengths.
"""

import math
from typing import Any

import jax


def matmul_flops(jaxpr: Any) -> int:
    """2 x the multiply-adds of all matrix products in `jaxpr` (a Jaxpr or ClosedJaxpr), the bodies of scans counted as
    often as they run. Elementwise operations and a library's fused attention kernels do not count; of the branches of a
    condition the dearest counts, and the body of a while loop counts once: its length is not known."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(left[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
    inner = [
        matmul_flops(sub)
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        if _is_jaxpr(sub)
    ]
    if equation.primitive.name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
