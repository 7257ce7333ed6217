"""Allocation of sparsity to blocks: uniform, by their outliers (OWL), or rising from the first to the last (ATP).

ATP (arXiv 2502.14770) lets the fraction to prune rise by the same beta from each block to the next, because the error
of an early block passes through all later ones. With L blocks and the overall fraction p, block l = 0..L-1 is pruned by

    p_l = p + beta * (l - (L - 1) / 2)
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.criteria import owl
from barber_jax.devices.mesh import Devices, broadcast_from_primary
from barber_jax.forward import passes
from barber_jax.models.family import Model
from barber_jax.models.numbers import LARGEST

OWL_LAMBDA, OWL_M = 0.08, 5.0
"""Default lambda and M, as published for LLaMA (arXiv 2310.05175)."""


@dataclass(frozen=True, kw_only=True)
class AllocationOptions(OptionGroup):
    """Allocation of sparsity to blocks."""

    allocate: Literal["uniform", "owl", "slope"] = "uniform"
    """Sparsity of each block: uniform, owl = lower where there are more outliers, slope = rising with depth."""
    owl_lambda: float | None = None
    """With owl: how far, approximately, a block's sparsity may differ from --sparsity. Default 0.08."""
    owl_m: float | None = None
    """With owl: a score above this many times its block's mean is an outlier. Default 5."""
    slope_beta: float | None = None
    """With slope: how much higher a block's sparsity is than that of the block before it, for example 0.005."""

    def settle(self) -> None:
        owners = {"owl_lambda": "owl", "owl_m": "owl", "slope_beta": "slope"}
        for option, owner in owners.items():
            if self.allocate != owner and getattr(self, option) is not None:
                raise BarberError(f"{flag(option)} {getattr(self, option):g} needs --allocate {owner}")
        if self.allocate == "owl":
            self._settle_owl()
        elif self.allocate == "slope":
            if self.slope_beta is None:
                raise BarberError("--allocate slope needs --slope-beta, the step of sparsity from block to block")
            if not 0 < self.slope_beta < 1:  # NaN fails this too
                raise BarberError(f"--slope-beta {self.slope_beta:g} is outside (0, 1)")

    def _settle_owl(self) -> None:
        for option, value in {"owl_lambda": OWL_LAMBDA, "owl_m": OWL_M}.items():
            if getattr(self, option) is None:
                self._set(option, value)
        if not 0 < self.owl_lambda <= 0.5:  # NaN fails this too
            raise BarberError(f"--owl-lambda {self.owl_lambda:g} is outside (0, 0.5]")
        if not 0 < self.owl_m <= LARGEST:
            raise BarberError(f"--owl-m {self.owl_m:g} must be a finite number above 0, within float32")


def slope(blocks: int, sparsity: float, beta: float) -> list[float]:
    """Compute the fraction to prune in each block for `--allocate slope`.

    Args:
        blocks: number of blocks, L.
        sparsity: overall fraction to prune, in [0, 1); the mean of the result.
        beta: difference between a block's fraction and that of the block before it.

    Raises:
        BarberError: the first block's fraction would be below 0, or the last one's too high.
    """
    half = (blocks - 1) / 2
    room = min(sparsity, owl.highest_sparsity(sparsity) - sparsity)
    if beta * half > room:
        most = math.floor(1e6 * room / half) / 1e6
        raise BarberError(
            f"--slope-beta {beta:g}: with {blocks} blocks and sparsity {sparsity:g} the first block keeps everything, "
            f"or the last one next to nothing: use at most {most:g}"
        )
    return [sparsity + beta * (block - half) for block in range(blocks)]


def check(options: AllocationOptions, sparsity: float, blocks: int) -> None:
    """Raise `BarberError` if the model has too many blocks for the options."""
    if options.allocate == "slope":
        slope(blocks, sparsity, options.slope_beta)


def block_sparsities(
    options: AllocationOptions,
    sparsity: float,
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray | None,
    devices: Devices,
    progress: Progress,
    *,
    batch: int,
    offload: bool,
) -> list[float]:
    """Compute the fraction to prune in each block, if it is not uniform.

    Args:
        options: `allocate` is not uniform.
        sparsity: overall fraction to prune, the mean of the result.
        ids: int32 [S, L] calibration tokens; owl alone needs them.
        batch: samples in a micro-batch.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
    """
    if options.allocate == "slope":
        return slope(model.layers, sparsity, options.slope_beta)
    batches = passes.micro_batches(ids, batch, devices.shape[0])
    with progress.phase("outliers of the dense model", model.layers) as phase:
        settings = {"threshold": options.owl_m, "offload": offload, "phase": phase}
        ratios = owl.outlier_ratios(checkpoint, model, batches, devices, **settings)
    if min(ratios) == max(ratios):
        progress.say(f"--owl-m {options.owl_m:g}: all blocks have the same outlier ratio and get the same sparsity")
    # The same values on every process: with different quotas the processes' programs would differ and deadlock.
    return broadcast_from_primary(lambda: owl.allocate(ratios, sparsity, options.owl_lambda))
