"""The one loop: for each block, load -> starting mask -> rebuild -> commit -> propagate -> drop.

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
from barber_jax.activations import Stream
from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, to_hf
from barber_jax.history import Commit, History
from barber_jax.mesh import DATA, Devices
from barber_jax.models.decoder import SubBlock
from barber_jax.models.family import Model
from barber_jax.passes import Parameters
from barber_jax.progress import Progress
from barber_jax.report import written_maps
from barber_jax.starting import BlockMasks, Start


@dataclass
class BlockResult:
    """What came of one block.

    Attributes:
        masks: Hugging Face weight name -> bool [out, in], True = kept.
        weights: Hugging Face weight name -> array [out, in] in its dtype: its own, or a criterion's update.
        start_masks: the same as `masks`, of the start.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    start_masks: dict[str, np.ndarray]
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


@dataclass
class Pruning:
    """Prunes a checkpoint's blocks in order, one in memory at a time; iterate over it once for their results.

    Args:
        checkpoint, model: what to prune; tensors already checked.
        ids: int32 [S, L] calibration tokens; None when neither `start` nor a rebuild looks at any.
        start: gives the starting masks.
        config: the options.
        progress: told of every stage.
        devices: what to compute on.
        history: blocks finished earlier, which are only propagated again, and where new ones are committed.

    Raises:
        BarberError: a tensor is damaged.
    """

    checkpoint: Checkpoint
    model: Model
    ids: np.ndarray | None
    start: Start
    config: PruneConfig
    progress: Progress
    devices: Devices = field(default_factory=Devices)
    history: History = field(default_factory=History)

    def __post_init__(self):
        self._block = self.model.block()
        self._shapes = dict(self._block.shapes)
        self._names = [self.model.kernel_names(index) for index in range(self.model.layers)]

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
                    dense = self.devices.block(self.model.sub_blocks, tensors)
                if index < self.history.finished:
                    commit = self.history.load(index, self._shapes)
                    stream_a, stream_b = self._replay(index, dense, commit, stream_a, stream_b, watch)
                else:
                    commit, stream_a, stream_b = self._prune(index, dense, stream_a, stream_b, watch)
                yield self._result(index, tensors, commit)

    def _streams(self) -> tuple[Stream | None, Stream | None]:
        """Streams A and B at the embeddings' output; None for one that the run does not need."""
        if not (self.start.needs_stream or self.config.rebuild):
            return None, None
        read = read_parameters(self.checkpoint, self.model.names.embed)
        parameters = {path: self.devices.put(value) for path, value in read.items()}
        ids = passes.micro_batches(self.ids, self.config.batch, self.devices.shape[0])
        # Offloaded micro-batches are embedded one by one: all at once would have to fit on the device.
        chunks = np.split(ids, len(ids)) if self.config.offload_activations else [ids]

        def stream() -> Stream:
            embedded = (
                passes.embed(self.model.embed(), parameters, self.devices.put(chunk, None, DATA)) for chunk in chunks
            )
            return Stream(embedded, self.config.offload_activations)

        return (stream() if self.start.needs_stream else None), (stream() if self.config.rebuild else None)

    def _read(self, index: int) -> dict[str, np.ndarray]:
        return read_parameters(self.checkpoint, self.model.names.of_block(index))

    def _prune(
        self, index: int, dense: Parameters, stream_a: Stream | None, stream_b: Stream | None, watch: Stopwatch
    ) -> tuple[Commit, Stream | None, Stream | None]:
        """What came of the block, committed, and both streams after it."""
        with watch.stage("start"):
            start_masks, start_weights = jax.block_until_ready(self.start(index, dense, stream_a))
        stream_a = self._propagate(index, {**dense, **start_weights}, start_masks, stream_a, watch)
        masks, weights, subs = start_masks, start_weights, []
        if stream_b is not None:
            masks, weights, stream_b, subs = self._rebuild(dense, start_masks, start_weights, stream_b, watch)
        with watch.stage("commit"):
            asked = self.start.needs_stream or self.config.save_start
            seen = (start_masks, start_weights) if asked and self.config.rebuild else ({}, {})
            commit = Commit(*self.devices.fetch((masks, weights, *seen)), record={})
            commit.record = self._record(index, commit.masks, subs, watch)
            self.history.commit(index, commit)
        # What is kept cannot hold how long keeping it took.
        commit.record["seconds"] = dict(watch.seconds)
        return commit, stream_a, stream_b

    def _replay(
        self,
        index: int,
        dense: Parameters,
        commit: Commit,
        stream_a: Stream | None,
        stream_b: Stream | None,
        watch: Stopwatch,
    ) -> tuple[Stream | None, Stream | None]:
        """Both streams after a block that was finished earlier."""
        sub_blocks = self.model.sub_blocks
        masks = self.devices.masks(sub_blocks, commit.masks)
        weights = {**dense, **self.devices.block(sub_blocks, commit.weights)}
        start_masks, start_weights = masks, weights
        if commit.start_masks:
            start_masks = self.devices.masks(sub_blocks, commit.start_masks)
            start_weights = {**dense, **self.devices.block(sub_blocks, commit.start_weights)}
        stream_a = self._propagate(index, start_weights, start_masks, stream_a, watch)
        if stream_b is not None:
            for sub in sub_blocks:
                with watch.stage(f"{sub.name} propagate"):
                    stream_b, _ = self._advance(sub, weights, masks, None, stream_b)
        return stream_a, stream_b

    def _propagate(
        self, index: int, weights: Parameters, masks: BlockMasks, stream: Stream | None, watch: Stopwatch
    ) -> Stream | None:
        """Stream A after the block."""
        if stream is None or index + 1 == self.model.layers:
            # After the last block nobody looks at it any more.
            return None
        with watch.stage("propagate"):
            chunks = (passes.propagate(self._block, weights, masks, chunk) for chunk in stream.take())
            return Stream(chunks, self.config.offload_activations).ready()

    def _rebuild(
        self, dense: Parameters, masks: BlockMasks, weights: Parameters, stream: Stream, watch: Stopwatch
    ) -> tuple[BlockMasks, Parameters, Stream, list[dict]]:
        """Rebuilt masks, surviving weights where they are not the dense ones, stream B after the block, records."""
        rebuilt, survivors, records = {}, {}, []
        for sub in self.model.sub_blocks:
            own = {path: masks[path] for path in sub.kernels}
            start = {path: weights[path] for path in sub.kernels if path in weights}
            with watch.stage(f"{sub.name} gradient"):
                importance, before, target = self._importance(sub, dense, start, own, stream)
            with watch.stage(f"{sub.name} swap"):
                if self.config.retain_reconstruction:
                    survivors |= rebuild.survivors({path: dense[path] for path in start}, start, own)
                base = {**dense, **survivors}
                kernels = {path: base[path] for path in sub.kernels}
                scores = rebuild.scores(sub, kernels, importance, self.config.metric)
                del importance
                granularity, pattern = self.config.granularity, self.config.sparsity_pattern
                alpha = jnp.float32(self.config.alpha)
                new, revived = rebuild.swap_masks(sub, scores, own, alpha, granularity=granularity, pattern=pattern)
                outliers = rebuild.outlier_maps(sub, scores, own, new)
                del scores
                swaps = {path: int(count) for path, count in revived.items()}
                maps = {path: np.asarray(outliers[path]) for path in sub.kernels}
            with watch.stage(f"{sub.name} propagate"):
                stream, after = self._advance(sub, base, new, target, stream)
            rebuilt.update(new)
            records.append({"loss_before": before, "loss_after": after, "swaps": swaps, "outliers": maps})
        return rebuilt, survivors, stream, records

    def _importance(
        self, sub: SubBlock, dense: Parameters, start: Parameters, masks: BlockMasks, stream: Stream
    ) -> tuple[Parameters, float, Stream]:
        """Importance of every weight of a sub-block, its loss before the swap, its dense outputs."""
        totals = rebuild.no_totals(self._block, sub)

        def outputs() -> Iterator[jax.Array]:
            nonlocal totals
            for chunk in stream:
                totals, out = rebuild.accumulate(self._block, sub, dense, start, masks, chunk, totals)
                yield out

        target = Stream(outputs(), self.config.offload_activations)
        importance, loss = rebuild.importance(sub, totals, jnp.float32(len(self.ids)))
        return jax.block_until_ready(importance), float(loss), target

    def _advance(
        self, sub: SubBlock, weights: Parameters, masks: BlockMasks, target: Stream | None, stream: Stream
    ) -> tuple[Stream, float]:
        """Stream B after a sub-block, and its loss against `target`. Without one the loss means nothing, but what is
        run is the same, so that a replayed stream is so to the last bit."""
        own = {path: masks[path] for path in sub.kernels}
        losses = []

        def outputs() -> Iterator[jax.Array]:
            dense = iter(target.take()) if target else None
            for chunk in stream.take():
                wanted = next(dense) if dense else jnp.zeros_like(chunk)
                after, loss = rebuild.advance(self._block, sub, weights, own, wanted, chunk)
                losses.append((loss, chunk.shape[0]))
                yield after

        after = Stream(outputs(), self.config.offload_activations).ready()
        return after, sum(float(loss) for loss, _ in losses) / sum(count for _, count in losses)

    def _record(self, index: int, masks: dict[str, np.ndarray], rebuilt: list[dict], watch: Stopwatch) -> dict:
        """The block's entry in run.json."""
        names = self._names[index]
        subs = []
        for place, sub in enumerate(self.model.sub_blocks):
            entry = dict(rebuilt[place]) if rebuilt else {}
            swaps, outliers = entry.pop("swaps", None), entry.pop("outliers", None)
            matrices = {
                names[path]: {"size": masks[path].size, "pruned": int(masks[path].size - np.count_nonzero(masks[path]))}
                | ({"revived": swaps[path], "outliers_pruned": written_maps(outliers[path])} if swaps else {})
                for path in sub.kernels
            }
            size = sum(matrix["size"] for matrix in matrices.values())
            entry["sparsity"] = sum(matrix["pruned"] for matrix in matrices.values()) / size
            if swaps:
                entry["swaps"] = sum(swaps.values())
            subs.append({"name": sub.name, **entry, "matrices": matrices})
        return {"block": index, "sub_blocks": subs, "seconds": dict(watch.seconds)}

    def _result(self, index: int, tensors: dict[str, np.ndarray], commit: Commit) -> BlockResult:
        names = self._names[index]
        return BlockResult(
            {names[path]: mask for path, mask in commit.masks.items()},
            {names[path]: to_hf(path, commit.weights.get(path, tensors[path])) for path in names},
            {names[path]: mask for path, mask in (commit.start_masks or commit.masks).items()},
            commit.record,
        )
