"""One sub-block through all its stages on stream B: target, rounds of the enabled stages, propagation.

With the rebuild alone this is LLM-Barber as published. Where a stage chooses by a loss (`--alpha auto`, refinement,
reconstruction), the last calibration samples are held out: they lie in chunks of their own at the end of the streams,
and no stage learns from them.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from barber_jax.console.progress import Stopwatch
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.masks.selection import Selection
from barber_jax.models.decoder import BlockDefinition, SubBlock
from barber_jax.stages import loss, targets, weights
from barber_jax.stages.base import BlockMasks, ChunkLoss, SharedOptions, Work, mean_loss
from barber_jax.stages.table import enabled_stages, validates

HELD_OUT = 8
"""One sample in HELD_OUT is held out."""


def held_out_samples(options: SharedOptions, samples: int, data_parallel: int) -> int:
    """How many of the samples are held out: a multiple of the devices that samples are sharded over, 0 where no stage
    chooses by a validation loss."""
    if not validates(options):
        return 0
    return max(1, samples // HELD_OUT // data_parallel) * data_parallel


class SubBlockStages:
    """Takes sub-blocks through the stages that the options ask for.

    Args:
        definition: of the block.
        options: of all stages.
        samples: calibration samples that stages learn from.
        data_parallel: over how many devices samples are sharded.
        selection: implementation of the selection, where a comparison group lies on one device.
    """

    def __init__(
        self,
        definition: BlockDefinition,
        options: SharedOptions,
        samples: int,
        data_parallel: int,
        selection: Selection = "count",
    ):
        self._definition, self._options = definition, options
        self._samples, self._data_parallel, self._selection = samples, data_parallel, selection
        self._stages = enabled_stages(options)

    def __call__(
        self,
        sub: SubBlock,
        dense: Parameters,
        start: Parameters,
        masks: BlockMasks,
        streams: Streams,
        watch: Stopwatch,
        token_weights: dict[str, Stream] | None = None,
    ) -> Work:
        """Take one sub-block through its stages, and the streams through the sub-block.

        Args:
            dense: the dense block's parameters, earlier sub-blocks as they have become.
            start: path -> starting weights where they differ from the dense ones.
            masks: kernel path -> starting mask.
            token_weights: see `Work.token_weights`.

        Returns:
            what became of the sub-block; `streams.rebuilt` and `streams.dense` are past it.
        """
        given = (self._definition, sub, self._options, self._samples, self._data_parallel, self._selection)
        work = Work(*given, dense, start, masks, streams, watch, token_weights or {})
        if self._options.retain_reconstruction or not self._options.rebuild:
            work.updated = weights.surviving_weights({path: dense[path] for path in start}, start, masks)
        self._begin(work)
        for work.round in range(self._options.rounds):
            for stage in self._stages:
                stage(work)
            work.sparse = work.updated
        if any(stage.changes_masks for stage in self._stages):
            regrown = weights.count_regrown(sub, work.masks, work.start_masks)
            work.record["swaps"] = {path: int(count) for path, count in regrown.items()}
        with watch.stage(f"{sub.name} propagate"):
            losses = self.advance(sub, work.parameters, work.masks, work.target, streams)
        work.record["loss_after"] = mean_loss(losses[streams.training])
        if streams.held_out:
            work.record["validation_loss_after"] = mean_loss(losses[streams.validation])
        return work

    def _begin(self, work: Work) -> None:
        """The target and the losses before the first stage; where only the rebuild with a fixed alpha follows, it gives
        both itself, at no cost."""
        if self._options.rebuild and not work.streams.held_out and work.streams.dense is None:
            return
        with work.watch.stage(f"{work.sub.name} target"):
            work.target = self._target(work.sub, work.dense, work.streams)
        with work.watch.stage(f"{work.sub.name} loss"):
            before = {**work.parameters, **work.sparse}
            work.record["loss_before"] = work.loss(before, work.masks, work.streams.training)
            if work.streams.held_out:
                validation = work.loss(before, work.masks, work.streams.validation)
                work.record["validation_loss_before"] = validation

    def advance(
        self, sub: SubBlock, parameters: Parameters, masks: BlockMasks, target: Stream | None, streams: Streams
    ) -> list[ChunkLoss]:
        """Take stream B through a sub-block; returns its loss against `target`, chunk by chunk.

        Without a target the losses mean nothing, but the same program runs, so that a stream that is replayed on
        resuming is the same to the last bit.
        """
        own = {path: masks[path] for path in sub.kernels}
        losses = []

        def outputs() -> Iterator[jax.Array]:
            wanted = iter(target.take()) if target is not None else None
            for chunk in streams.rebuilt.take():
                aim = next(wanted) if wanted is not None else jnp.zeros_like(chunk)
                arguments = (self._definition, sub, parameters, own, aim, chunk, self._options.token_weighting)
                after, total = loss.advance(*arguments)
                losses.append((total, chunk.shape[0]))
                yield after

        streams.rebuilt = Stream(outputs(), streams.rebuilt.offloaded).ready()
        return losses

    def advance_dense(self, sub: SubBlock, dense: Parameters, streams: Streams) -> Stream:
        """Take the dense stream through a sub-block; returns the `dense` target that it gives."""
        offload, wanted = streams.rebuilt.offloaded, []

        def outputs() -> Iterator[jax.Array]:
            own = iter(streams.dense.take())
            for chunk in streams.rebuilt:
                after, target = targets.dense(self._definition, sub, dense, next(own), chunk)
                wanted.append(Stream([target], offload))
                yield after

        streams.dense = Stream(outputs(), offload).ready()
        return Stream.joined(wanted)

    def _target(self, sub: SubBlock, dense: Parameters, streams: Streams) -> Stream:
        if streams.dense is not None:
            return self.advance_dense(sub, dense, streams)
        outputs = (targets.same(self._definition, sub, dense, chunk) for chunk in streams.rebuilt)
        return Stream(outputs, streams.rebuilt.offloaded).ready()
