"""The one loop: for each block, load -> starting mask -> rebuild -> hand over -> propagate -> drop.

Two streams of activations go through the model in one pass: stream A is the model under the
starting masks alone and gives each block its starting mask; stream B is the model as rebuilt so far and rebuilds it.
The result is that of pruning the whole model first and rebuilding it afterwards, with each block read once.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax import passes, rebuild
from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, to_hf
from barber_jax.models.family import Model
from barber_jax.passes import Parameters
from barber_jax.progress import Progress
from barber_jax.starting import BlockMasks, Start


@dataclass
class BlockResult:
    """What came of one block.

    Attributes:
        masks: Hugging Face weight name -> bool [out, in], True = kept.
        weights: Hugging Face weight name -> array [out, in] in its dtype: its own, or a criterion's update.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    record: dict


@dataclass
class Stopwatch:
    """Seconds spent in each stage of one block."""

    progress: Progress
    block: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what it computes must be ready when it ends."""
        self.progress.stage(self.block, name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Run:
    """What stays the same from block to block; see `prune_blocks`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Model,
        ids: np.ndarray | None,
        start: Start,
        config: PruneConfig,
        progress: Progress,
    ):
        self.checkpoint, self.model, self.start = checkpoint, model, start
        self.config, self.progress = config, progress
        self.block = model.block()
        self.ids = None if ids is None else passes.micro_batches(ids, config.batch)

    def __iter__(self) -> Iterator[BlockResult]:
        stream_a, stream_b = self._streams()
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, 0)
            for index in range(self.model.layers):
                watch = Stopwatch(self.progress, index)
                with watch.stage("read"):
                    tensors = ahead.result()
                    if index + 1 < self.model.layers:
                        ahead = reader.submit(self._read, index + 1)
                    dense = {path: jnp.asarray(value) for path, value in tensors.items()}
                with watch.stage("start"):
                    masks, weights = jax.block_until_ready(self.start(index, dense, stream_a))
                if stream_a is not None:
                    # After the last block nobody looks at stream A any more.
                    with watch.stage("propagate"):
                        if index + 1 < self.model.layers:
                            stream_a = passes.propagate(self.block, {**dense, **weights}, masks, stream_a)
                            jax.block_until_ready(stream_a)
                subs = []
                if stream_b is not None:
                    masks, weights, stream_b, subs = self._rebuild(dense, masks, weights, stream_b, watch)
                yield self._result(index, tensors, masks, weights, subs, watch)

    def _streams(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Streams A and B at the embeddings' output; None for one that the run does not need."""
        if not (self.start.needs_stream or self.config.rebuild):
            return None, None
        embed = {path: jnp.asarray(v) for path, v in read_parameters(self.checkpoint, self.model.names.embed).items()}
        hidden = passes.embed(self.model.embed(), embed, self.ids)
        if not self.config.rebuild:
            return hidden, None
        # Each stream is consumed by its passes, so the two cannot share their start.
        return (hidden.copy() if self.start.needs_stream else None), hidden

    def _read(self, index: int) -> dict[str, np.ndarray]:
        return read_parameters(self.checkpoint, self.model.names.of_block(index))

    def _rebuild(
        self, dense: Parameters, masks: BlockMasks, weights: Parameters, stream: jax.Array, watch: Stopwatch
    ) -> tuple[BlockMasks, Parameters, jax.Array, list[dict]]:
        """Rebuilt masks, surviving weights where they are not the dense ones, stream B after the block, records."""
        rebuilt, survivors, records = {}, {}, []
        for sub in self.model.sub_blocks:
            own = {path: masks[path] for path in sub.kernels}
            start = {path: weights[path] for path in sub.kernels if path in weights}
            with watch.stage(f"{sub.name} gradient"):
                found = rebuild.importance(self.block, sub, dense, start, own, stream)
                importance, before, target = jax.block_until_ready(found)
            with watch.stage(f"{sub.name} swap"):
                if self.config.retain_reconstruction:
                    survivors |= rebuild.survivors({path: dense[path] for path in start}, start, own)
                base = {**dense, **survivors}
                new, revived = rebuild.swap_masks(
                    sub,
                    {path: base[path] for path in sub.kernels},
                    importance,
                    own,
                    jnp.float32(self.config.alpha),
                    metric=self.config.metric,
                    granularity=self.config.granularity,
                    pattern=self.config.sparsity_pattern,
                )
                swaps = {path: int(count) for path, count in revived.items()}
            with watch.stage(f"{sub.name} propagate"):
                stream, after = jax.block_until_ready(rebuild.advance(self.block, sub, base, new, target, stream))
            rebuilt.update(new)
            records.append({"loss_before": float(before), "loss_after": float(after), "swaps": swaps})
        return rebuilt, survivors, stream, records

    def _result(
        self,
        index: int,
        tensors: dict[str, np.ndarray],
        masks: BlockMasks,
        weights: Parameters,
        rebuilt: list[dict],
        watch: Stopwatch,
    ) -> BlockResult:
        names = self.model.kernel_names(index)
        kept = {path: np.asarray(mask) for path, mask in masks.items()}
        subs = []
        for place, sub in enumerate(self.model.sub_blocks):
            entry = dict(rebuilt[place]) if rebuilt else {}
            swaps = entry.pop("swaps", None)
            matrices = {
                names[path]: {"size": kept[path].size, "pruned": int(kept[path].size - np.count_nonzero(kept[path]))}
                | ({"revived": swaps[path]} if swaps else {})
                for path in sub.kernels
            }
            size = sum(matrix["size"] for matrix in matrices.values())
            entry["sparsity"] = sum(matrix["pruned"] for matrix in matrices.values()) / size
            if swaps:
                entry["swaps"] = sum(swaps.values())
            subs.append({"name": sub.name, **entry, "matrices": matrices})
        record = {"block": index, "sub_blocks": subs, "seconds": watch.seconds}
        return BlockResult(
            {names[path]: mask for path, mask in kept.items()},
            {names[path]: to_hf(path, np.asarray(weights.get(path, tensors[path]))) for path in names},
            record,
        )


def prune_blocks(
    checkpoint: Checkpoint,
    model: Model,
    ids: np.ndarray | None,
    start: Start,
    config: PruneConfig,
    progress: Progress,
) -> Iterator[BlockResult]:
    """Prune a checkpoint's blocks in order, one in memory at a time.

    Args:
        checkpoint, model: what to prune; tensors already checked.
        ids: int32 [S, L] calibration tokens; None when neither `start` nor a rebuild looks at any.
        start: gives the starting masks.
        config: the options.
        progress: told of every stage.

    Raises:
        BarberError: a tensor is damaged.
    """
    return iter(_Run(checkpoint, model, ids, start, config, progress))
