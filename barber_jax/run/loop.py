"""The pruning loop: for each decoder block, read -> starting mask -> stages -> commit -> propagate -> drop.

Two activation streams pass through the model together. Stream A holds the activations of the model under its starting
masks alone and is used to compute the starting mask of each block. Stream B holds the activations of the model as
rebuilt so far and is used to rebuild each block. The result is the same as pruning the whole model first and rebuilding
it afterwards, but each block is read only once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.progress import Phase, Stopwatch
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.finite import does_not_fit
from barber_jax.convert.parameters import read_parameters, to_hf
from barber_jax.criteria.starting import BlockMasks, Start
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.dense import embedded, read_embedding
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream, Streams
from barber_jax.masks.selection import Selection
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
        weights: Hugging Face name -> tensor in the checkpoint's dtype, before the mask is applied: every prunable
            weight [out, in] (dense, updated by the criterion or trained), and every other parameter that was changed.
        start_masks: Hugging Face weight name -> bool [out, in], starting mask.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    start_masks: dict[str, np.ndarray]
    record: dict


@dataclass
class Pruning:
    """Prunes the blocks of a checkpoint in order, one in memory at a time. Iterate over it once to get the results.

    Args:
        checkpoint, model: the model to prune; its tensors are already checked.
        ids: int32 [S, L] calibration tokens; None if neither `start` nor a stage uses activations.
        start: source of the starting masks.
        options: of the stages.
        batch: samples in a micro-batch.
        phase: shows the current stage of each block.
        devices: devices to compute on.
        history: blocks finished by an earlier process, through which the streams are only propagated. New blocks are
            committed to it.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
        keep_start: whether `BlockResult.start_masks` is needed; otherwise it may hold the final masks.
        token_weights: index of a block -> kernel path -> float32 [S, L], weights of tokens by the end loss; None where
            no stage needs them.
        selection: implementation of the stages' selection, where a comparison group lies on one device.

    Raises:
        BarberError: when iterated over, if a tensor is damaged or the activations overflow.
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
    selection: Selection = "count"
    token_weights: Callable[[int], dict[str, np.ndarray]] | None = None

    def __post_init__(self):
        self._blocks = self.model.blocks()
        self._shapes = dict(self._blocks[0].shapes)
        self._runs_stages = bool(enabled_stages(self.options))
        samples, data_parallel = 0 if self.ids is None else len(self.ids), self.devices.shape[0]
        self._held_out = held_out_samples(self.options, samples, data_parallel)
        learned = samples - self._held_out
        self._stages_of_kind = [
            SubBlockStages(definition, self.options, learned, data_parallel, self.selection)
            for definition in self._blocks.definitions
        ]
        self._names = [self.model.kernel_names(index) for index in range(self.model.layers)]

    def __iter__(self) -> Iterator[BlockResult]:
        streams = self._streams()
        with ThreadPoolExecutor(1) as reader:
            next_block = reader.submit(self._read, 0)
            for index in range(self.model.layers):
                watch = Stopwatch(self.phase, index)
                with watch.stage("read"):
                    tensors = next_block.result()
                    if index + 1 < self.model.layers:
                        next_block = reader.submit(self._read, index + 1)
                    dense = self.devices.put_block(self.model.sub_blocks, tensors)
                if index < self.history.finished:
                    commit = self.history.load(index, self._shapes)
                    self._replay(index, dense, commit, streams, watch)
                else:
                    commit = self._prune(index, dense, streams, watch)
                yield self._result(index, tensors, commit)

    def _streams(self) -> Streams:
        """Embed the calibration tokens into the streams that the run needs."""
        if not (self.start.needs_stream or self._runs_stages):
            return Streams()
        ids, boundaries = self._split(self.ids)
        held_out = self._held_out // ids.shape[1]
        embedding = read_embedding(self.checkpoint, self.model, ids, self.devices)

        def stream() -> Stream:
            return Stream(embedded(self.model, *embedding, boundaries, self.devices), self.offload)

        return Streams(
            stream() if self.start.needs_stream else None,
            stream() if self._runs_stages else None,
            stream() if needs_dense_stream(self.options) else None,
            held_out if self.offload else min(held_out, 1),
        )

    def _split(self, values: np.ndarray) -> tuple[np.ndarray, Sequence[int]]:
        """Micro-batches [M, B, L] of [S, L], and those before which a new chunk of a stream begins."""
        batches = passes.micro_batches(values, self.batch, self.devices.shape[0], self._held_out)
        held_out = self._held_out // batches.shape[1]
        # With offloading, embed one micro-batch at a time: all of them might not fit on the device.
        return batches, range(1, len(batches)) if self.offload else [len(batches) - held_out] if held_out else []

    def _token_weights(self, index: int) -> dict[str, Stream]:
        """`Work.token_weights` of a block; {} where no stage needs them."""
        if self.token_weights is None:
            return {}
        return {path: self._chunks(weights) for path, weights in self.token_weights(index).items()}

    def _chunks(self, values: np.ndarray) -> Stream:
        """[S, L] on the devices, in chunks [m, B, L] as those of the streams."""
        return Stream((self.devices.put(chunk, None, DATA) for chunk in np.split(*self._split(values))), offload=False)

    def _stages(self, index: int) -> SubBlockStages:
        return self._stages_of_kind[self._blocks.kinds[index]]

    def _read(self, index: int) -> dict[str, np.ndarray]:
        return read_parameters(self.checkpoint, self.model.names.of_block(index))

    def _prune(self, index: int, dense: Parameters, streams: Streams, watch: Stopwatch) -> Commit:
        """Prune a block, propagate the streams through it and commit it."""
        with watch.stage("start"):
            start_masks, start_weights = jax.block_until_ready(self.start(index, dense, streams.start))
        self._check_fit(index, start_weights)
        self._propagate(index, {**dense, **start_weights}, start_masks, streams, watch)
        masks, weights, records = start_masks, start_weights, []
        if streams.rebuilt is not None:
            masks, weights = {}, {}
            token_weights = self._token_weights(index)
            for sub in self.model.sub_blocks:
                sub_masks = {path: start_masks[path] for path in sub.kernels}
                paths = self._blocks[index].paths(sub)
                sub_weights = {path: start_weights[path] for path in paths if path in start_weights}
                work = self._stages(index)(sub, dense, sub_weights, sub_masks, streams, watch, token_weights)
                masks |= work.masks
                weights |= work.updated
                self._check_fit(index, work.updated)
                if not math.isfinite(loss := work.record["loss_after"]):
                    raise BarberError(
                        f"block {index}, {sub.name}: the loss is {loss}; "
                        "the activations overflow, check the checkpoint's weights up to this block"
                    )
                records.append(work.record)
        with watch.stage("commit"):
            # Without stages the starting masks are the masks.
            keep_start = self._runs_stages and (self.start.needs_stream or self.keep_start)
            starting = (start_masks, start_weights) if keep_start else ({}, {})
            commit = Commit(*self.devices.fetch((masks, weights, *starting)), record={})
            commit.record = self._record(index, commit.masks, records, watch)
            self.history.commit(index, commit)
        # The committed record cannot include how long committing it took; the returned one does.
        commit.record["seconds"] = dict(watch.seconds)
        return commit

    def _check_fit(self, index: int, weights: Parameters) -> None:
        """Raise BarberError if weights of a block, already in the checkpoint's dtype, do not fit it.

        The writer would refuse them too, but only after a loss of NaN that says nothing of the cause. NaN itself comes
        from elsewhere, and is left to the check of the loss.
        """
        for path, overflow in _overflow(weights).items():
            if overflow:
                raise does_not_fit(self.model.names.of_block(index)[path], weights[path].dtype)

    def _replay(self, index: int, dense: Parameters, commit: Commit, streams: Streams, watch: Stopwatch) -> None:
        """Propagate the streams through a block that an earlier process finished."""
        sub_blocks = self.model.sub_blocks
        masks = self.devices.put_masks(sub_blocks, commit.masks)
        weights = {**dense, **self.devices.put_block(sub_blocks, commit.weights)}
        start_masks, start_weights = masks, weights
        if commit.start_masks:
            start_masks = self.devices.put_masks(sub_blocks, commit.start_masks)
            start_weights = {**dense, **self.devices.put_block(sub_blocks, commit.start_weights)}
        self._propagate(index, start_weights, start_masks, streams, watch)
        if streams.rebuilt is None:
            return
        for sub in sub_blocks:
            if streams.dense is not None:
                with watch.stage(f"{sub.name} target"):
                    self._stages(index).advance_dense(sub, dense, streams)
            with watch.stage(f"{sub.name} propagate"):
                self._stages(index).advance(sub, weights, masks, None, streams)

    def _propagate(
        self, index: int, weights: Parameters, masks: BlockMasks, streams: Streams, watch: Stopwatch
    ) -> None:
        """Propagate stream A through a block with its starting weights and masks."""
        if streams.start is None:
            return
        if index + 1 == self.model.layers:
            # The stream is not needed after the last block.
            streams.start = None
            return
        with watch.stage("propagate"):
            block = self._blocks[index]
            chunks = (passes.propagate(block, weights, masks, chunk) for chunk in streams.start.take())
            streams.start = Stream(chunks, self.offload).ready()

    def _record(self, index: int, masks: dict[str, np.ndarray], sub_records: list[dict], watch: Stopwatch) -> dict:
        """The block's entry in run.json.

        Args:
            sub_records: records of the sub-blocks' stages; empty if there were none.
        """
        names = self._names[index]
        subs = []
        for position, sub in enumerate(self.model.sub_blocks):
            entry = dict(sub_records[position]) if sub_records else {}
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
        """Convert a committed block to Hugging Face names and layouts; `tensors` are the dense block's parameters."""
        kernels, names = self._names[index], self.model.names.of_block(index)
        return BlockResult(
            {kernels[path]: mask for path, mask in commit.masks.items()},
            {names[path]: to_hf(path, commit.weights.get(path, tensors[path])) for path in kernels | commit.weights},
            {kernels[path]: mask for path, mask in (commit.start_masks or commit.masks).items()},
            commit.record,
        )


@jax.jit
def _overflow(weights: Parameters) -> dict[str, jax.Array]:
    """Path -> bool [], whether any value is infinite."""
    return {path: jnp.isinf(value).any() for path, value in weights.items()}
