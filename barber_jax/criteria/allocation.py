"""How much to prune in each block: OWL, outlier weighed layerwise sparsity (Yin et al., arXiv 2310.05175).

In the dense model, for all prunable weights of a block together, with X_j a linear's input:

    A_ij = |W_ij| * ||X_j||_2
    D    = fraction of them with A_ij > M * mean(A)                 the block's outlier ratio

A block that holds more outliers keeps more: the fractions kept are D scaled to a span of 2 lambda between the lowest
and the highest block, and shifted so that their mean is what is kept overall. As the authors' code does it, the mean is
that of the whole block, so that a matrix of large scores counts as one of outliers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.console.progress import Phase, Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.criteria import wanda
from barber_jax.devices.mesh import Devices, share
from barber_jax.forward import dense, passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.models.decoder import SubBlock
from barber_jax.models.family import Model
from barber_jax.models.sharding import constrain

MOST_PRUNED = 0.99
"""Of any block, where not more is asked for of all."""
OWL_LAMBDA, OWL_M = 0.08, 5.0
"""As published for LLaMA (arXiv 2310.05175)."""


@dataclass(frozen=True, kw_only=True)
class AllocationOptions(OptionGroup):
    """How sparsity is allocated to blocks."""

    allocate: Literal["uniform", "owl"] = "uniform"
    """Sparsity of each block: uniform, or owl = less where the dense model has more outliers."""
    owl_lambda: float | None = None
    """With owl: how far a block may lie from --sparsity, about. Default 0.08."""
    owl_m: float | None = None
    """With owl: a score this many times its block's mean counts as an outlier. Default 5."""

    def settle(self) -> None:
        options = {"owl_lambda": OWL_LAMBDA, "owl_m": OWL_M}
        for option, value in options.items():
            if self.allocate == "uniform" and getattr(self, option) is not None:
                raise BarberError(f"{flag(option)} {getattr(self, option):g} needs --allocate owl")
            if self.allocate == "owl" and getattr(self, option) is None:
                self._set(option, value)
        if self.allocate == "uniform":
            return
        if not 0 < self.owl_lambda <= 0.5:  # NaN fails this too
            raise BarberError(f"--owl-lambda {self.owl_lambda:g} is outside (0, 0.5]")
        if not 0 < self.owl_m < math.inf:
            raise BarberError(f"--owl-m {self.owl_m:g} must be a finite number above 0")


def allocate(ratios: Sequence[float], sparsity: float, reach: float) -> list[float]:
    """The fraction to prune in each block.

    Args:
        ratios: the blocks' outlier ratios.
        sparsity: the mean of what is returned, in [0, 1).
        reach: lambda; what is returned spans twice as much. Less where a block would have to lose less than nothing,
            or more than `MOST_PRUNED`.
    """
    deviations = np.asarray(ratios, np.float64) - np.mean(ratios)
    span = deviations.max() - deviations.min()
    if span == 0:
        return [sparsity] * len(ratios)
    kept = deviations * (2 * reach / span)
    most = max(MOST_PRUNED, (1 + sparsity) / 2)
    fit = min(1.0, sparsity / kept.max(), (most - sparsity) / -kept.min())
    return [max(0.0, sparsity - fit * more) for more in kept.tolist()]


@partial(jax.jit, static_argnames="sub_blocks")
def count_outliers(
    sub_blocks: tuple[SubBlock, ...], parameters: Parameters, squares: dict[str, jax.Array], threshold: jax.Array
) -> dict[str, jax.Array]:
    """How many weights of each kernel have a score of more than `threshold` times the mean score of the block.

    Args:
        parameters: of the block.
        squares: input name -> float32 [I], `wanda.statistic`.

    Returns:
        kernel path -> int32.
    """
    scores = {}
    for linear, entering in (pair for sub in sub_blocks for pair in sub.linears):
        path = f"{linear}.kernel"
        scores[path] = jnp.abs(parameters[path].astype(jnp.float32)) * jnp.sqrt(squares[entering])[:, None]
    # Along one axis after the other: a running sum over a whole matrix loses digits.
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
    """Every block's outlier ratio, by a forward of the dense model with one block in memory at a time.

    Args:
        ids: int32 [M, B, L] token ids, M micro-batches of B samples.
        threshold: M of the paper.
        offload: keep activations in host memory, but for a micro-batch.
        phase: told of every block that is done, if given.
    """
    block, ratios = model.block(), []

    def visit(parameters: Parameters, stream: Stream) -> None:
        interrupt.check()
        squares: dict[str, jax.Array] = {}
        for chunk in stream:
            more = passes.statistics(block, wanda.statistic, parameters, chunk)
            squares = jax.tree.map(jnp.add, squares, more) if squares else more
        counts = devices.fetch(count_outliers(model.sub_blocks, parameters, squares, jnp.float32(threshold)))
        # Python's integers: all matrices of a block together may be more than an int32 counts.
        ratios.append(sum(int(count) for count in counts.values()) / sum(parameters[path].size for path in counts))

    dense.final_hidden(checkpoint, model, ids, devices, offload, visit, phase)
    return ratios


def block_sparsities(
    options: AllocationOptions,
    sparsity: float,
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray,
    devices: Devices,
    progress: Progress,
    *,
    batch: int,
    offload: bool,
) -> list[float]:
    """The fraction to prune in each block under `--allocate owl`.

    Args:
        sparsity: their mean.
        ids: int32 [S, L] calibration tokens.
        batch: samples in a micro-batch.
        offload: keep activations in host memory, but for a micro-batch.
    """
    batches = passes.micro_batches(ids, batch, devices.shape[0])
    with progress.phase("outliers of the dense model", model.layers) as phase:
        settings = {"threshold": options.owl_m, "offload": offload, "phase": phase}
        ratios = outlier_ratios(checkpoint, model, batches, devices, **settings)
    if min(ratios) == max(ratios):
        progress.say(f"--owl-m {options.owl_m:g}: every block has the same share of outliers; all are pruned alike")
    # One process's word: programs that differ in a block's quota would wait for each other for ever.
    return share(lambda: allocate(ratios, sparsity, options.owl_lambda))
