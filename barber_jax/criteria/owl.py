"""Sparsity of blocks by OWL, outlier weighed layerwise sparsity (Yin et al., arXiv 2310.05175).

Over all prunable weights of a block of the dense model, with X_j an input of the weight's linear:

    A_ij = |W_ij| * ||X_j||_2
    D    = fraction of weights with A_ij > M * mean(A)              the block's outlier ratio

A block with a higher outlier ratio keeps more weights: the fractions kept are D, scaled so that the lowest and the
highest block are 2 lambda apart and shifted so that their mean is the fraction kept overall. As in the authors' code,
mean(A) is taken over the whole block, so a matrix whose scores are all large consists of outliers.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.progress import Phase
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.criteria import wanda
from barber_jax.devices.mesh import Devices
from barber_jax.forward import dense, passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.models.family import Model
from barber_jax.models.sharding import constrain

MAX_SPARSITY = 0.99
"""Highest sparsity of a block. Where the overall sparsity p is above 0.98, the bound is (1 + p) / 2 instead."""


def highest_sparsity(sparsity: float) -> float:
    """Highest fraction to prune in a block, for an overall fraction in [0, 1)."""
    return max(MAX_SPARSITY, (1 + sparsity) / 2)


def allocate(ratios: Sequence[float], sparsity: float, half_range: float) -> list[float]:
    """Compute the fraction to prune in each block from the blocks' outlier ratios.

    Args:
        ratios: outlier ratio of each block.
        sparsity: overall fraction to prune, in [0, 1); the mean of the result.
        half_range: lambda; highest minus lowest fraction is 2 lambda. It is reduced where a fraction would be below 0,
            or above `MAX_SPARSITY`.
    """
    deviations = np.asarray(ratios, np.float64) - np.mean(ratios)
    span = deviations.max() - deviations.min()
    if span == 0:
        return [sparsity] * len(ratios)
    extra_kept = deviations * (2 * half_range / span)
    scale = min(1.0, sparsity / extra_kept.max(), (highest_sparsity(sparsity) - sparsity) / -extra_kept.min())
    return [max(0.0, sparsity - scale * extra) for extra in extra_kept.tolist()]


@partial(jax.jit, static_argnames="sub_blocks")
def count_outliers(
    sub_blocks: tuple[SubBlock, ...], parameters: Parameters, squares: dict[str, jax.Array], threshold: jax.Array
) -> dict[str, jax.Array]:
    """Count the outliers of each kernel: weights whose score is above `threshold` times the block's mean score.

    Args:
        parameters: of the block.
        squares: input name -> float32 [I], `wanda.statistic` summed over all samples.
        threshold: M of the paper, a float32 scalar.

    Returns:
        Kernel path -> int32 scalar.
    """
    scores = {}
    for linear, input_name in (pair for sub in sub_blocks for pair in sub.linears):
        path = f"{linear}.kernel"
        scores[path] = jnp.abs(parameters[path].astype(jnp.float32)) * jnp.sqrt(squares[input_name])[:, None]
    # Sum one axis at a time: a running float32 sum over a whole matrix loses precision.
    total = sum(jnp.sum(jnp.sum(score, axis=0)) for score in scores.values())
    bound = threshold * total / sum(score.size for score in scores.values())
    return {path: constrain(jnp.sum(score > bound, dtype=jnp.int32)) for path, score in scores.items()}


def outlier_ratios(
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray,
    devices: Devices,
    *,
    threshold: float,
    offload: bool = False,
    phase: Phase | None = None,
) -> list[float]:
    """Compute the outlier ratio of each block in a forward pass of the dense model, one block in memory at a time.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B samples.
        threshold: M of the paper.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
        phase: advanced after each block, if given.
    """
    ratios = []

    def visit(block: BlockDefinition, parameters: Parameters, stream: Stream) -> None:
        interrupt.check()
        squares: dict[str, jax.Array] = {}
        for chunk in stream:
            of_chunk = passes.statistics(block, wanda.statistic, parameters, chunk)
            squares = jax.tree.map(jnp.add, squares, of_chunk) if squares else of_chunk
        counts = devices.fetch(count_outliers(model.sub_blocks, parameters, squares, jnp.float32(threshold)))
        # Add up as Python integers: the total over a block's matrices may overflow int32.
        ratios.append(sum(int(count) for count in counts.values()) / sum(parameters[path].size for path in counts))

    dense.final_hidden(checkpoint, model, ids, devices, offload, visit, phase)
    return ratios
