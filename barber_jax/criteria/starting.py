"""Starting masks of each block: by a criterion, from a mask file, or from the zeros of a pruned checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.options import OptionGroup, flag
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import check_names_and_shapes, check_same_settings, to_flax
from barber_jax.criteria import CRITERIA
from barber_jax.criteria.base import Criterion, Quota
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.masks.mask_file import FILE_NAME, Masks
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import Selection
from barber_jax.masks.selector import Selector
from barber_jax.models.family import Model
from barber_jax.models.sharding import constrain, kernel_axes, sharded_axes

OUTSIDE_BLOCKS = ("vocabulary", "embedding", "final_norm", "tied")
"""Settings of models that have nothing to do with their decoder blocks."""

BlockMasks = dict[str, jax.Array]
"""Kernel path -> bool [out, in], True = kept."""


@dataclass(frozen=True, kw_only=True)
class StartOptions(OptionGroup):
    """Source of the starting masks."""

    method: Literal[*CRITERIA] | None = None
    """Criterion of the starting mask. Default wanda, unless --masks or --sparse-ckpt is given."""
    masks: Path | None = None
    """Start from this mask file (masks.safetensors, or its folder) instead."""
    sparse_ckpt: str | None = None
    """Start from the zeros and weights of this pruned checkpoint of the model instead; with --masks, its weights."""

    def settle(self) -> None:
        if self.masks is not None:
            # A folder stands for the mask file in it.
            folder = expand(self.masks).is_dir()
            self._set("masks", Path(self.masks) / FILE_NAME if folder else Path(self.masks))
        given = [flag(name) for name in ("masks", "sparse_ckpt") if getattr(self, name)]
        if given and self.method:
            raise BarberError(f"--method {self.method} and {given[0]} both give the starting mask; choose one")
        if not given and self.method is None:
            self._set("method", "wanda")


class Start(Protocol):
    """A source of starting masks, called for each block in order.

    Attributes:
        needs_stream: whether it uses activations of the model under its starting masks (stream A).
    """

    needs_stream: bool

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        """Return the starting masks of a block, and its starting weights where they differ from the dense ones.

        Args:
            index: of the block.
            dense: parameters of the dense block.
            stream: stream A at the block's input; None where it is not needed.

        Returns:
            Kernel path -> bool [out, in] mask, True = kept; and parameter path -> starting weights in the dtype of the
            dense ones: kernels [in, out], and biases and norms.
        """


@partial(jax.jit, static_argnames=("criterion", "axes", "samples", "pattern", "select"))
def _start_matrix(
    criterion: Criterion,
    axes: tuple[str | None, str | None],
    kernel: jax.Array,
    prepared: Any,
    samples: int,
    pattern: SparsityPattern,
    quota: Quota,
    select: Selector,
) -> tuple[jax.Array, jax.Array | None]:
    """Call `Criterion.start` for a kernel [in, out] that is sharded over the mesh axes `axes`.

    Returns:
        bool [out, in] mask, and the updated kernel in the kernel's dtype, or None.
    """
    mask, updated = criterion.start(kernel.astype(jnp.float32), prepared, samples, pattern, quota, select)
    if updated is not None:
        # Round now to the dtype that will be written, so that the streams are computed with exactly these weights.
        updated = constrain(updated.astype(kernel.dtype), *axes)
    return constrain(mask, *axes[::-1]), updated


class CriterionStart:
    """Starting masks by a criterion, whose statistics come from a forward pass of the dense block on stream A.

    Args:
        samples: number of calibration samples.
        say: prints a line.
        selection: implementation of the selection, where a group of weights lies on one device.

    Attributes:
        sparsities: fraction to prune in each block; the pattern's for all, unless set otherwise.
        gradients: index of a block -> kernel path -> norm of the weights' gradients, float32 [in, out]; must be set for
            a criterion that uses them, which `needs_gradients` names.

    Raises:
        BarberError: when called, if the activations overflow.
    """

    def __init__(
        self,
        criterion: Criterion,
        model: Model,
        samples: int,
        pattern: SparsityPattern,
        say: Callable[[str], None],
        selection: Selection = "count",
    ):
        self._selection = selection
        self._criterion, self._model, self._samples, self._pattern = criterion, model, samples, pattern
        self._say, self._blocks = say, model.blocks()
        self.needs_stream = criterion.statistic is not None
        self.needs_gradients = criterion.gradients
        self.gradients: Callable[[int], Parameters] | None = None
        self.sparsities: Sequence[float] = [pattern.sparsity] * model.layers

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        prepared = self._prepared_statistics(index, dense, stream)
        if self.needs_gradients:
            prepared = {path: (prepared[path], gradient) for path, gradient in self.gradients(index).items()}
        masks, weights = {}, {}
        for sub in self._model.sub_blocks:
            for path in sub.kernels:
                axes = kernel_axes(sub, path)
                masks[path], updated = _start_matrix(
                    self._criterion,
                    axes,
                    dense[path],
                    prepared.get(path),
                    self._samples,
                    self._pattern,
                    self._quota(index, dense[path].shape),
                    Selector(self._selection, sharded_axes(axes[::-1])),
                )
                if updated is not None:
                    weights[path] = updated
        return masks, weights

    def _prepared_statistics(self, index: int, dense: Parameters, stream: Stream | None) -> dict[str, Any]:
        """Kernel path -> prepared statistic of its input; None where the criterion uses the weights alone."""
        criterion, statistics = self._criterion, {}
        for chunk in stream or ():
            of_chunk = passes.statistics(self._blocks[index], criterion.statistic, dense, chunk)
            statistics = jax.tree.map(jnp.add, statistics, of_chunk) if statistics else of_chunk
        if not all(bool(jnp.isfinite(statistic).all()) for statistic in jax.tree.leaves(statistics)):
            where = f"block {index}: the inputs of its linears are not finite"
            raise BarberError(f"{where}; the activations overflow, check the checkpoint's weights up to this block")
        if criterion.prepare:
            where = f"block {index}, "
            statistics = {n: criterion.prepare(s, self._samples, where + n, self._say) for n, s in statistics.items()}
        linears = [pair for sub in self._model.sub_blocks for pair in sub.linears]
        return {f"{linear}.kernel": statistics.get(input_name) for linear, input_name in linears}

    def _quota(self, index: int, shape: tuple[int, ...]) -> Quota:
        """Number of weights to prune in each comparison group of a kernel [in, out] of block `index`."""
        if self._pattern.structured:
            return ()
        inputs, outputs = shape
        # int32 rather than Python integers, which would be traced as weakly typed.
        return tuple(np.int32(count) for count in self._criterion.quota((outputs, inputs), self.sparsities[index]))


class MaskFileStart:
    """Starting masks from a masks.safetensors file.

    Raises:
        BarberError: names or shapes do not match the model; when called, if a mask does not have the pattern.
    """

    needs_stream = False

    def __init__(self, masks: Masks, checkpoint: Checkpoint, model: Model, pattern: SparsityPattern, devices: Devices):
        self._masks, self._model, self._pattern, self._devices = masks, model, pattern, devices
        check_names_and_shapes(masks.shapes, model.pruned_names(), checkpoint, f"{masks.path}: mask")

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        masks = {path: self._masks.read(name) for path, name in self._model.kernel_names(index).items()}
        for path, mask in masks.items():
            check_pattern(mask, self._pattern, f"{self._masks.path}: {self._model.kernel_names(index)[path]}")
        return self._devices.put_masks(self._model.sub_blocks, masks), {}


class SparseCheckpointStart:
    """Starting masks from the zeros of a pruned checkpoint, and starting weights from its other weights.

    The biases and norms of its blocks are starting weights too, where they differ from the dense model's. Tensors
    outside the blocks are ignored.

    Args:
        sparse: the pruned checkpoint.
        checkpoint: the dense checkpoint.
        file: the masks of the pruned checkpoint, if known: without them, and where the checkpoint holds none itself,
            a kept weight that happens to be zero counts as pruned.

    Raises:
        BarberError: names or shapes do not match the model; when called, if the zeros do not match `file` or the
            pattern.
    """

    needs_stream = False

    def __init__(
        self,
        sparse: Checkpoint,
        checkpoint: Checkpoint,
        model: Model,
        pattern: SparsityPattern,
        devices: Devices,
        file: Masks | None = None,
    ):
        self._sparse, self._checkpoint, self._file = sparse, checkpoint, file
        self._model, self._pattern, self._devices = model, pattern, devices
        required = [name for index in range(model.layers) for name in model.names.of_block(index).values()]
        prefix = model.pruned_names()[0].partition(".0.")[0] + "."
        shapes = {name: sparse.shape(name) for name in sparse.names() if name.startswith(prefix)}
        # Ignore unknown one-dimensional tensors, which may be buffers such as rotary frequencies.
        known = set(required)
        relevant = {name: shape for name, shape in shapes.items() if len(shape) == 2 or name in known}
        check_names_and_shapes(relevant, required, checkpoint, f"{sparse.location}: weight")
        check_same_settings(model, checkpoint.location, sparse, "it must be of the same model", but=OUTSIDE_BLOCKS)
        if file:
            check_names_and_shapes(file.shapes, model.pruned_names(), checkpoint, f"{file.path}: mask")

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        masks, weights = {}, {}
        for path, name in self._model.kernel_names(index).items():
            tensor = self._sparse.read(name)
            mask = self._file.read(name) if self._file else _kept(self._sparse, name, tensor)
            if self._file and np.any(tensor[~mask]):
                raise BarberError(
                    f"{self._sparse.location}: {name} is not zero everywhere that {self._file.path} prunes; "
                    "give the masks of that checkpoint"
                )
            check_pattern(mask, self._pattern, f"{self._sparse.location}: {name}")
            masks[path] = mask
            weights[path] = _cast(to_flax(path, tensor), dense[path].dtype)
        for path, name in self._model.names.of_block(index).items():
            if path not in masks:
                original, given = self._checkpoint.read(name), self._sparse.read(name)
                # Compare in the pruned checkpoint's dtype: where it is narrower, differences by rounding do not count.
                if np.any(_cast(original, given.dtype) != given):
                    weights[path] = _cast(to_flax(path, given), original.dtype)
        sub_blocks = self._model.sub_blocks
        return self._devices.put_masks(sub_blocks, masks), self._devices.put_block(sub_blocks, weights)

    def sparsity(self) -> float:
        """Fraction of zeros among all prunable weights. Reads every tensor, one at a time."""
        names = self._model.pruned_names()
        zeros = sum(int((~_kept(self._sparse, name, self._sparse.read(name))).sum()) for name in names)
        return zeros / sum(self._sparse.size(name) for name in names)


def _kept(sparse: Checkpoint, name: str, tensor: np.ndarray) -> np.ndarray:
    """Which weights of a tensor [out, in] the pruned checkpoint keeps: by its own mask if it has one, else by zeros."""
    mask = sparse.mask(name)
    return tensor != 0 if mask is None else mask


def _cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast without NumPy's warning about values that become Inf, which the loop over the blocks reports by name."""
    with np.errstate(over="ignore"):
        return tensor.astype(dtype)


def check_pattern(mask: np.ndarray, pattern: SparsityPattern, what: str) -> None:
    """Raise `BarberError` unless the mask, bool [out, in], has the pattern; `what` begins the error message."""
    pattern.check_inputs(mask.shape[1], what)
    if pattern.structured and not (mask.reshape(-1, pattern.of).sum(axis=1) == pattern.keep).all():
        raise BarberError(f"{what} does not keep {pattern.keep} of every {pattern.of} inputs, as its pattern says")
