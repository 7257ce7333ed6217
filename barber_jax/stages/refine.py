"""Refinement of a sub-block's masks: swaps by their exact gain in each linear's error, no weight changed.

With `gradient` weighting a token counts in a linear's error by the squared gradient of the dense model's end loss at
the linear's output (the idea of GuidedQuant, arXiv 2505.07004).

Swaps overfit where samples are few, so every matrix is refined with several shrinkages of its Gram matrix, and the mask
with the lowest error on held-out samples is taken.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from barber_jax.console.options import OptionGroup
from barber_jax.stages import layerwise
from barber_jax.stages.base import INT32_MAX, Stage, Work
from barber_jax.stages.exact_swaps import make_swaps
from barber_jax.stages.weights import shard_masks

SHRINKAGES = (0.01, 0.1, 0.5, 2.0)
"""Candidates for the fraction of its diagonal that is added to G. Correlations between inputs are estimated poorly from
few samples; with the diagonal alone, swaps would be those of Wanda's score."""


RefineWeighting = Literal["tokens", "gradient"]


@dataclass(frozen=True, kw_only=True)
class RefineOptions(OptionGroup):
    """Better masks: swaps by their exact gain."""

    refine: int = 0
    """Maximum number of swaps in each output, each by its exact gain in layer-wise error; 0 = none."""
    refine_weighting: RefineWeighting = "tokens"
    """Weight of a token in the layer-wise error: tokens = by --token-weighting, gradient = by the end loss."""

    def settle(self) -> None:
        self._require_least(0, "refine")
        self._require_most(INT32_MAX, "refine")


def refine_matrix(
    kernel: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    training: jax.Array,
    validation: jax.Array,
    limit: int,
    *,
    of: int,
) -> tuple[jax.Array, float] | None:
    """Refine a matrix's mask with every shrinkage and keep the one with the lowest validation error.

    Args:
        kernel: [I, O], as it is now; where pruned, the value that a weight regrows as.
        dense: [I, O], the dense kernel.
        mask: bool [O, I].
        training, validation: Gram matrices float32 [I, I] of the samples to learn from and of the held-out ones.
        limit: swaps in every output at most.
        of: M of an N:M pattern, 0: unstructured.

    Returns:
        bool [O, I] mask and the shrinkage that gave it, or None where none is better than the mask as it is.
    """
    least, best = float(layerwise.loss(kernel, dense, mask, validation)), None
    for shrinkage in SHRINKAGES:
        gram = layerwise.shrunk(training, jnp.float32(shrinkage))
        new, _, _ = make_swaps(kernel, dense, mask, gram, jnp.int32(limit), of=of)
        error = float(layerwise.loss(kernel, dense, new, validation))
        if error < least:
            least, best = error, (new, shrinkage)
    return best


class Refine(Stage):
    """Refinement as a stage."""

    name = "refine"
    options = ("refine_weighting",)
    switch = "--refine"

    def enabled(self, options: RefineOptions) -> bool:
        return options.refine > 0

    def validates(self, options: RefineOptions) -> bool:
        return True

    def __call__(self, work: Work) -> None:
        """Refine matrix by matrix, each on the inputs that those before it now give; all of it is undone if the
        sub-block's validation loss does not fall."""
        with work.watch.stage(f"{work.sub.name} refine"):
            self._refine(work)

    def _refine(self, work: Work) -> None:
        before, masks, updated = work.validation_loss(), work.masks, work.updated
        limit, of = work.options.refine, work.options.sparsity_pattern.of
        chosen: dict[str, float | None] = {}
        groups = layerwise.inputs(work.sub).items()
        if work.options.refine_weighting == "gradient":
            # Linears that read the same input weight its tokens differently.
            groups = [(entering, (path,)) for entering, kernels in groups for path in kernels]
        for entering, kernels in groups:
            given = work.token_weights.get(kernels[0])
            training, _ = layerwise.summed(work, entering, work.streams.training, given)
            validation, _ = layerwise.summed(work, entering, work.streams.validation, given)
            for path in kernels:
                kernel = work.updated.get(path, work.dense[path])
                best = refine_matrix(kernel, work.dense[path], work.masks[path], training, validation, limit, of=of)
                chosen[path] = best and best[1]
                if best:
                    work.set_masks(shard_masks(work.sub, {**work.masks, path: best[0]}))
        if not work.validation_loss() < before:
            work.masks, work.updated, chosen = masks, updated, dict.fromkeys(chosen)
        work.record.setdefault("shrinkage", []).append(chosen)


STAGE = Refine()
