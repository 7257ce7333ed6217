"""The one loop: for each block, load -> starting mask -> rebuild -> commit -> propagate -> drop.

Two streams of activations go through the model in one pass: stream A is the model under the
starting masks alone and gives each block its starting mask; stream B is the model as rebuilt so far and rebuilds it.
The result is that of pruning the whole model first and rebuilding it afterwards, with each block read once.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Progress, Stopwatch
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, to_hf
from barber_jax.criteria.starting import BlockMasks, Start
from barber_jax.devices.mesh import DATA, Devices
from barber_jax.forward import passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.models.family import Model
from barber_jax.reports.run_record import written_maps
from barber_jax.run.history import Commit, History
from barber_jax.stages.sub_block import Stages, samples_apart


@dataclass
class BlockResult:
    """What came of one block.

    Attributes:
        masks: Hugging Face weight name -> bool [out, in], True = kept.
        weights: Hugging Face name -> tensor in its dtype, for every pruned weight ([out, in]) its own, a criterion's
            update or a trained one, and for whatever else was trained.
        start_masks: the same as `masks`, of the start.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    start_masks: dict[str, np.ndarray]
    record: dict


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
        self._apart = samples_apart(self.config, self.devices.shape[0])
        learned = self.config.samples - self._apart
        self._stages = Stages(self._block, self.config, learned, self.devices.shape[0])
        self._names = [self.model.kernel_names(index) for index in range(self.model.layers)]

    def __iter__(self) -> Iterator[BlockResult]:
        streams = self._streams()
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
                    self._replay(index, dense, commit, streams, watch)
                else:
                    commit = self._prune(index, dense, streams, watch)
                yield self._result(index, tensors, commit)

    def _streams(self) -> Streams:
        """The streams that the run needs, at the embeddings' output."""
        config = self.config
        if not (self.start.needs_stream or config.changes):
            return Streams()
        read = read_parameters(self.checkpoint, self.model.names.embed)
        parameters = {path: self.devices.put(value) for path, value in read.items()}
        ids = passes.micro_batches(self.ids, config.batch, self.devices.shape[0], self._apart)
        # Offloaded micro-batches are embedded one by one: all at once would have to fit on the device.
        apart = self._apart // ids.shape[1]
        places = range(1, len(ids)) if config.offload_activations else [len(ids) - apart] if apart else []
        chunks = np.split(ids, places)

        def stream() -> Stream:
            embedded = (
                passes.embed(self.model.embed(), parameters, self.devices.put(chunk, None, DATA)) for chunk in chunks
            )
            return Stream(embedded, config.offload_activations)

        return Streams(
            stream() if self.start.needs_stream else None,
            stream() if config.changes else None,
            stream() if config.follows_dense else None,
            apart if config.offload_activations else min(apart, 1),
        )

    def _read(self, index: int) -> dict[str, np.ndarray]:
        return read_parameters(self.checkpoint, self.model.names.of_block(index))

    def _prune(self, index: int, dense: Parameters, streams: Streams, watch: Stopwatch) -> Commit:
        """What came of the block, committed; the streams are after it then."""
        with watch.stage("start"):
            start_masks, start_weights = jax.block_until_ready(self.start(index, dense, streams.start))
        self._propagate(index, {**dense, **start_weights}, start_masks, streams, watch)
        masks, weights, records = start_masks, start_weights, []
        if streams.rebuilt is not None:
            masks, weights = {}, {}
            for sub in self.model.sub_blocks:
                own = {path: start_masks[path] for path in sub.kernels}
                start = {path: start_weights[path] for path in self._block.paths(sub) if path in start_weights}
                work = self._stages(sub, dense, start, own, streams, watch)
                masks |= work.masks
                weights |= work.updated
                if not math.isfinite(loss := work.record["loss_after"]):
                    where = f"block {index}, {sub.name}: the loss is {loss}"
                    raise BarberError(f"{where}; the activations overflow, check the checkpoint's weights up to there")
                records.append(work.record)
        with watch.stage("commit"):
            asked = self.start.needs_stream or self.config.save_start
            seen = (start_masks, start_weights) if asked and self.config.changes else ({}, {})
            commit = Commit(*self.devices.fetch((masks, weights, *seen)), record={})
            commit.record = self._record(index, commit.masks, records, watch)
            self.history.commit(index, commit)
        # What is kept cannot hold how long keeping it took.
        commit.record["seconds"] = dict(watch.seconds)
        return commit

    def _replay(self, index: int, dense: Parameters, commit: Commit, streams: Streams, watch: Stopwatch) -> None:
        """Take the streams through a block that was finished earlier."""
        sub_blocks = self.model.sub_blocks
        masks = self.devices.masks(sub_blocks, commit.masks)
        weights = {**dense, **self.devices.block(sub_blocks, commit.weights)}
        start_masks, start_weights = masks, weights
        if commit.start_masks:
            start_masks = self.devices.masks(sub_blocks, commit.start_masks)
            start_weights = {**dense, **self.devices.block(sub_blocks, commit.start_weights)}
        self._propagate(index, start_weights, start_masks, streams, watch)
        if streams.rebuilt is None:
            return
        for sub in sub_blocks:
            if streams.dense is not None:
                with watch.stage(f"{sub.name} target"):
                    self._stages.follow(sub, dense, streams)
            with watch.stage(f"{sub.name} propagate"):
                self._stages.advance(sub, weights, masks, None, streams)

    def _propagate(
        self, index: int, weights: Parameters, masks: BlockMasks, streams: Streams, watch: Stopwatch
    ) -> None:
        """Take stream A through the block."""
        if streams.start is None:
            return
        if index + 1 == self.model.layers:
            # After the last block nobody looks at it any more.
            streams.start = None
            return
        with watch.stage("propagate"):
            chunks = (passes.propagate(self._block, weights, masks, chunk) for chunk in streams.start.take())
            streams.start = Stream(chunks, self.config.offload_activations).ready()

    def _record(self, index: int, masks: dict[str, np.ndarray], rebuilt: list[dict], watch: Stopwatch) -> dict:
        """The block's entry in run.json."""
        names = self._names[index]
        subs = []
        for place, sub in enumerate(self.model.sub_blocks):
            entry = dict(rebuilt[place]) if rebuilt else {}
            swaps, outliers = entry.pop("swaps", None), entry.pop("outliers", None)
            matrices = {
                names[path]: {"size": masks[path].size, "pruned": int(masks[path].size - np.count_nonzero(masks[path]))}
                | ({"revived": swaps[path]} if swaps else {})
                | ({"outliers_pruned": written_maps(outliers[path])} if outliers else {})
                for path in sub.kernels
            }
            size = sum(matrix["size"] for matrix in matrices.values())
            entry["sparsity"] = sum(matrix["pruned"] for matrix in matrices.values()) / size
            if swaps:
                entry["swaps"] = sum(swaps.values())
            subs.append({"name": sub.name, **entry, "matrices": matrices})
        return {"block": index, "sub_blocks": subs, "seconds": dict(watch.seconds)}

    def _result(self, index: int, tensors: dict[str, np.ndarray], commit: Commit) -> BlockResult:
        names, table = self._names[index], self.model.names.of_block(index)
        return BlockResult(
            {names[path]: mask for path, mask in commit.masks.items()},
            {table[path]: to_hf(path, commit.weights.get(path, tensors[path])) for path in names | commit.weights},
            {names[path]: mask for path, mask in (commit.start_masks or commit.masks).items()},
            commit.record,
        )
