"""The pruning loop: for each decoder block, read -> starting mask -> stages -> commit -> propagate -> drop.

Two activation streams go through the model in one pass. Stream A is that of the model under its starting masks alone,
and gives each block its starting mask; stream B is that of the model as rebuilt so far, and is what a block is rebuilt
on. The result is that of pruning the whole model first and rebuilding it afterwards, with each block read once.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Phase, Stopwatch
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import read_parameters, to_hf
from barber_jax.criteria.starting import BlockMasks, Start
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA
from barber_jax.run.history import Commit, History
from barber_jax.stages import SharedOptions, SubBlockStages, held_out_samples
from barber_jax.stages.outliers import format_maps
from barber_jax.stages.table import enabled_stages, needs_dense_stream


@dataclass
class BlockResult:
    """A pruned block.

    Attributes:
        masks: Hugging Face weight name -> bool [out, in], True = kept.
        weights: Hugging Face name -> tensor in its dtype: for every pruned weight ([out, in]) the dense one, a
            criterion's update or the trained one, and every other parameter that was trained.
        start_masks: Hugging Face weight name -> bool [out, in], the starting mask.
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
        ids: int32 [S, L] calibration tokens; None where neither `start` nor a stage looks at any.
        start: gives the starting masks.
        options: of the stages.
        batch: samples in a micro-batch.
        phase: told of every stage of every block.
        devices: what to compute on.
        history: blocks finished by an earlier process, through which the streams are only propagated, and where new
            blocks are committed.
        offload: keep activations in host memory, but for a micro-batch.
        keep_start: whether the starting masks are wanted in the results.

    Raises:
        BarberError: a tensor is damaged.
    """

    checkpoint: Checkpoint
    model: Model
    ids: np.ndarray | None
    start: Start
    options: SharedOptions
    batch: int
    phase: Phase
    devices: Devices = field(default_factory=Devices)
    history: History = field(default_factory=History)
    offload: bool = False
    keep_start: bool = False

    def __post_init__(self):
        self._block = self.model.block()
        self._shapes = dict(self._block.shapes)
        self._runs_stages = bool(enabled_stages(self.options))
        samples, data_parallel = 0 if self.ids is None else len(self.ids), self.devices.shape[0]
        self._held_out = held_out_samples(self.options, samples, data_parallel)
        self._stages = SubBlockStages(self._block, self.options, samples - self._held_out, data_parallel)
        self._names = [self.model.kernel_names(index) for index in range(self.model.layers)]

    def __iter__(self) -> Iterator[BlockResult]:
        streams = self._streams()
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, 0)
            for index in range(self.model.layers):
                watch = Stopwatch(self.phase, index)
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
        if not (self.start.needs_stream or self._runs_stages):
            return Streams()
        read = read_parameters(self.checkpoint, self.model.names.embed)
        parameters = {path: self.devices.put(value) for path, value in read.items()}
        ids = passes.micro_batches(self.ids, self.batch, self.devices.shape[0], self._held_out)
        held_out = self._held_out // ids.shape[1]
        # Offloaded micro-batches are embedded one by one: all at once would have to fit on the device.
        places = range(1, len(ids)) if self.offload else [len(ids) - held_out] if held_out else []
        chunks = np.split(ids, places)

        def stream() -> Stream:
            embedded = (
                passes.embed(self.model.embed(), parameters, self.devices.put(chunk, None, DATA)) for chunk in chunks
            )
            return Stream(embedded, self.offload)

        return Streams(
            stream() if self.start.needs_stream else None,
            stream() if self._runs_stages else None,
            stream() if needs_dense_stream(self.options) else None,
            held_out if self.offload else min(held_out, 1),
        )

    def _read(self, index: int) -> dict[str, np.ndarray]:
        return read_parameters(self.checkpoint, self.model.names.of_block(index))

    def _prune(self, index: int, dense: Parameters, streams: Streams, watch: Stopwatch) -> Commit:
        """Prune a block and commit it; takes the streams through it."""
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
            wanted = self._runs_stages and (self.start.needs_stream or self.keep_start)
            seen = (start_masks, start_weights) if wanted else ({}, {})
            commit = Commit(*self.devices.fetch((masks, weights, *seen)), record={})
            commit.record = self._record(index, commit.masks, records, watch)
            self.history.commit(index, commit)
        # The record on disk cannot contain how long committing it took.
        commit.record["seconds"] = dict(watch.seconds)
        return commit

    def _replay(self, index: int, dense: Parameters, commit: Commit, streams: Streams, watch: Stopwatch) -> None:
        """Take the streams through a block that an earlier process finished."""
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
                    self._stages.advance_dense(sub, dense, streams)
            with watch.stage(f"{sub.name} propagate"):
                self._stages.advance(sub, weights, masks, None, streams)

    def _propagate(
        self, index: int, weights: Parameters, masks: BlockMasks, streams: Streams, watch: Stopwatch
    ) -> None:
        """Take stream A through the block."""
        if streams.start is None:
            return
        if index + 1 == self.model.layers:
            # Nothing reads it after the last block.
            streams.start = None
            return
        with watch.stage("propagate"):
            chunks = (passes.propagate(self._block, weights, masks, chunk) for chunk in streams.start.take())
            streams.start = Stream(chunks, self.offload).ready()

    def _record(self, index: int, masks: dict[str, np.ndarray], rebuilt: list[dict], watch: Stopwatch) -> dict:
        """The block's entry in run.json."""
        names = self._names[index]
        subs = []
        for place, sub in enumerate(self.model.sub_blocks):
            entry = dict(rebuilt[place]) if rebuilt else {}
            swaps, outliers = entry.pop("swaps", None), entry.pop("outliers", None)
            matrices = {
                names[path]: {"size": masks[path].size, "pruned": int(masks[path].size - np.count_nonzero(masks[path]))}
                | ({"regrown": swaps[path]} if swaps else {})
                | ({"outliers_pruned": format_maps(outliers[path])} if outliers else {})
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
