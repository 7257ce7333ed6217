"""LLM-Barber's rebuild of a sub-block's mask (arXiv 2408.10631): pruned weights that matter swap places with kept ones
that do not.

    score = |W| * D          equation 5, D the gradient importance of gradients.py

In every comparison group the pruned weights with the highest scores regrow, and as many kept ones with the lowest
scores are pruned; which and how many is decided in `masks.selection.swap`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import Selection, swap
from barber_jax.masks.selector import Selector
from barber_jax.models.decoder import SubBlock
from barber_jax.models.sharding import constrain, mask_axes, sharded_axes
from barber_jax.stages import gradients
from barber_jax.stages.base import BlockMasks, Stage, Work
from barber_jax.stages.outliers import outlier_maps
from barber_jax.stages.weights import shard_masks

Granularity = Literal["block", "layer", "output1", "input1"]
Metric = Literal["wd", "w", "d"]

ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""What `--alpha auto` chooses from, lowest first: the lower one wins where losses are equal."""


@dataclass(frozen=True, kw_only=True)
class RebuildOptions(OptionGroup):
    """LLM-Barber: swap pruned weights that matter for kept ones that do not."""

    rebuild: bool = True
    """Rebuild the starting mask by LLM-Barber."""
    granularity: Granularity | None = None
    """Comparison group in which weights compete. Default as published for --method."""
    alpha: float | Literal["auto"] | None = None
    """Fraction of the outlier pairs to swap, or auto = by held-out loss. Default as published for --method."""
    metric: Metric = "wd"
    """Score: wd = |weight| x gradient (the paper's), w = |weight|, d = gradient."""
    retain_reconstruction: bool = False
    """Keep weights that sparsegpt or alps (or --sparse-ckpt) updated, instead of the dense ones."""

    def settle(self) -> None:
        if self.alpha not in ("auto", None) and not 0 <= self.alpha <= 1:  # NaN fails this too
            raise BarberError(f"--alpha {self.alpha:g} is outside [0, 1]")


@partial(jax.jit, static_argnames=("sub", "metric"))
def scores(sub: SubBlock, weights: Parameters, importance: dict[str, jax.Array], metric: Metric) -> Parameters:
    """The score by which weights compete.

    Args:
        weights: kernel path -> [in, out] weights as they survive.
        importance: kernel path -> float32 D [in, out].

    Returns:
        kernel path -> float32 [out, in].
    """

    def score(path: str) -> jax.Array:
        weight, root = jnp.abs(weights[path].astype(jnp.float32)), importance[path]
        return constrain({"wd": weight * root, "w": weight, "d": root}[metric].T, *mask_axes(sub, path))

    return {path: score(path) for path in sub.kernels}


def swap_masks(
    sub: SubBlock,
    scores: dict[str, jax.Array],
    masks: BlockMasks,
    alpha: jax.Array,
    *,
    granularity: Granularity,
    pattern: SparsityPattern,
    selection: Selection = "count",
) -> BlockMasks:
    """The rebuilt masks of a sub-block.

    Args:
        scores: kernel path -> float32 [out, in].
        masks: kernel path -> bool [out, in] starting mask.
        alpha: fraction of outlier pairs to swap.
        selection: implementation of the selection, where a comparison group lies on one device.

    Returns:
        kernel path -> bool [out, in].
    """

    def swapped(path: str) -> jax.Array:
        """The new mask of a matrix whose groups do not span others."""
        select = Selector(selection, sharded_axes(mask_axes(sub, path)))
        if pattern.structured:
            return select.swap_n_of_m(scores[path], masks[path], alpha, pattern.keep, pattern.of)
        return select.swap(scores[path], masks[path], alpha, granularity)

    order = sub.kernels  # not the dictionaries' order: jit sorts their keys
    if granularity == "block" and not pattern.structured:
        values, old = [scores[path] for path in order], [masks[path] for path in order]
        new = swap(values, old, alpha, granularity)
    else:
        new = [swapped(path) for path in order]
    return shard_masks(sub, dict(zip(order, new, strict=True)))


class Rebuild(Stage):
    """The rebuild as a stage."""

    name = "rebuild"
    options = ("alpha", "metric")
    switch = "a rebuild; leave out --no-rebuild"

    def enabled(self, options: RebuildOptions) -> bool:
        return options.rebuild

    def validates(self, options: RebuildOptions) -> bool:
        return options.alpha == "auto"

    def __call__(self, work: Work) -> None:
        """New masks by the gradient of the loss between the dense and the pruned sub-block."""
        with work.watch.stage(f"{work.sub.name} gradient"):
            importance, before = self._importance(work)
            work.record.setdefault("loss_before", before)
        with work.watch.stage(f"{work.sub.name} swap"):
            base = work.parameters
            kernels = {path: base[path] for path in work.sub.kernels}
            found = scores(work.sub, kernels, importance, work.options.metric)
            del importance
            new, alpha = self._swap(work, found, base)
            maps = outlier_maps(work.sub, found, work.masks, new)
            del found
            if work.options.alpha == "auto":
                work.record.setdefault("alpha", []).append(alpha)
            work.record["outliers"] = {path: np.asarray(maps[path]) for path in work.sub.kernels}
            work.set_masks(new)

    def _importance(self, work: Work) -> tuple[Parameters, float]:
        """Gradient importance of every weight, and the loss before the swaps. The dense outputs become the target where
        there is none yet."""
        totals = gradients.zero_totals(work.definition, work.sub)

        def outputs():
            nonlocal totals
            for chunk in work.streams.rebuilt.part(work.streams.training):
                arguments = (work.definition, work.sub, work.dense, work.sparse, work.masks, chunk, totals)
                totals, out = gradients.accumulate(*arguments, work.options.token_weighting)
                yield out

        if work.target is None:
            work.target = Stream(outputs(), work.streams.rebuilt.offloaded)
        else:
            for _ in outputs():
                pass
        importance, loss = gradients.importance(work.sub, totals, jnp.float32(work.samples))
        return jax.block_until_ready(importance), float(loss)

    def _swap(self, work: Work, found: dict[str, jax.Array], base: Parameters) -> tuple[BlockMasks, float]:
        """New masks, and the alpha that gave them."""
        options = work.options

        def swapped(alpha: float) -> BlockMasks:
            settings = {"granularity": options.granularity, "pattern": options.sparsity_pattern}
            settings["selection"] = work.selection
            return swap_masks(work.sub, found, work.masks, jnp.float32(alpha), **settings)

        if options.alpha != "auto":
            return swapped(options.alpha), options.alpha
        losses = {}
        for alpha in ALPHAS:
            masks = swapped(alpha) if alpha else work.masks
            losses[alpha] = work.loss(base, masks, work.streams.validation)
        best = min(losses, key=losses.get)
        return (swapped(best) if best else work.masks), best


STAGE = Rebuild()
