"""The peak of a device: the rate of matrix products of a model's own shapes, measured."""

import time

import jax
import jax.numpy as jnp

from barber_jax.models.family import Model

REPEATS = 7


def matmul_rates(model: Model, tokens: int, dtype: jnp.dtype) -> dict[str, float]:
    """Measure the rate of X W for every distinct shape of the model's kernels, best of `REPEATS`, on one device.

    Args:
        tokens: rows of X, [tokens, in]; W is [in, out].
        dtype: of X and W.

    Returns:
        "TOKENSxINxOUT" -> operations per second.
    """
    matmul = jax.jit(jnp.matmul)
    rates = {}
    shapes = dict(model.block().shapes)
    for shape in sorted({shapes[path] for sub in model.sub_blocks for path in sub.kernels}):
        x, weight = jnp.ones((tokens, shape[0]), dtype), jnp.ones(shape, dtype)
        jax.block_until_ready(matmul(x, weight))
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(matmul(x, weight))
            best = min(best, time.perf_counter() - start)
        rates[f"{tokens}x{shape[0]}x{shape[1]}"] = 2 * tokens * shape[0] * shape[1] / best
    return rates
