"""Starting masks of block after block: by a criterion, from a mask file, or from the zeros of a pruned checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.parameters import to_flax
from barber_jax.criteria import CRITERIA
from barber_jax.criteria.base import Criterion, Quota
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.passes import Parameters
from barber_jax.forward.streams import Stream
from barber_jax.masks.mask_file import Masks
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.models.family import Model
from barber_jax.models.sharding import constrain, kernel_axes

BlockMasks = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class StartOptions(OptionGroup):
    """Where the starting masks come from."""

    method: Literal[*CRITERIA] | None = None
    """Criterion of the starting mask. Default wanda, unless --masks or --sparse-ckpt is given."""
    masks: Path | None = None
    """Start from this mask file (masks.safetensors) instead."""
    sparse_ckpt: str | None = None
    """Start from the zeros and weights of this pruned copy of the model instead; with --masks, its weights."""

    def settle(self) -> None:
        given = [flag(name) for name in ("masks", "sparse_ckpt") if getattr(self, name)]
        if given and self.method:
            raise BarberError(f"--method {self.method} and {given[0]} both give the starting mask; choose one")
        if not given and self.method is None:
            self._set("method", "wanda")


class Start(Protocol):
    """Gives the starting masks of one block after another.

    Attributes:
        needs_stream: whether it looks at activations under the starting masks (stream A).
    """

    needs_stream: bool

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        """Kernel path -> bool [out, in] mask, and path -> starting weights where they are not the dense ones, in
        the dense ones' dtype: kernels [in, out], and whatever else of the block is given."""


@partial(jax.jit, static_argnames=("criterion", "axes", "samples", "pattern"))
def _start_matrix(
    criterion: Criterion,
    axes: tuple[str | None, str | None],
    kernel: jax.Array,
    prepared: Any,
    samples: int,
    pattern: SparsityPattern,
    quota: Quota,
) -> tuple[jax.Array, jax.Array | None]:
    """`Criterion.start` for a kernel that is spread over mesh axes `axes`."""
    mask, updated = criterion.start(kernel.astype(jnp.float32), prepared, samples, pattern, quota)
    if updated is not None:
        # Rounded at once to what will be written, so that the streams carry the very weights of the result.
        updated = constrain(updated.astype(kernel.dtype), *axes)
    return constrain(mask, *axes[::-1]), updated


class CriterionStart:
    """Starting masks by a criterion, from a forward of the still dense block on stream A.

    Attributes:
        sparsities: the fraction to prune in each block; at first the pattern's in all.

    Raises:
        BarberError: the activations overflow.
    """

    def __init__(
        self, criterion: Criterion, model: Model, samples: int, pattern: SparsityPattern, say: Callable[[str], None]
    ):
        self._criterion, self._model, self._samples, self._pattern = criterion, model, samples, pattern
        self._say, self._block = say, model.block()
        self.needs_stream = criterion.statistic is not None
        self.sparsities: Sequence[float] = [pattern.sparsity] * model.layers

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        prepared = self._prepared(index, dense, stream)
        masks, weights = {}, {}
        for sub in self._model.sub_blocks:
            for path in sub.kernels:
                masks[path], updated = _start_matrix(
                    self._criterion,
                    kernel_axes(sub, path),
                    dense[path],
                    prepared.get(path),
                    self._samples,
                    self._pattern,
                    self._quota(index, dense[path].shape),
                )
                if updated is not None:
                    weights[path] = updated
        return masks, weights

    def _prepared(self, index: int, dense: Parameters, stream: Stream | None) -> dict[str, Any]:
        """Kernel path -> what the criterion knows of its input; None when it looks at weights alone."""
        criterion, seen = self._criterion, {}
        for chunk in stream or ():
            more = passes.statistics(self._block, criterion.statistic, dense, chunk)
            seen = jax.tree.map(jnp.add, seen, more) if seen else more
        if not all(bool(jnp.isfinite(statistic).all()) for statistic in jax.tree.leaves(seen)):
            where = f"block {index}: what enters its linears is not finite"
            raise BarberError(f"{where}; the activations overflow, check the checkpoint's weights up to there")
        if criterion.prepare:
            where = f"block {index}, "
            seen = {n: criterion.prepare(s, self._samples, where + n, self._say) for n, s in seen.items()}
        linears = [pair for sub in self._model.sub_blocks for pair in sub.linears]
        return {f"{linear}.kernel": seen.get(entering) for linear, entering in linears}

    def _quota(self, index: int, shape: tuple[int, ...]) -> Quota:
        """How many weights a kernel [in, out] of a block loses."""
        if self._pattern.structured:
            return ()
        inputs, outputs = shape
        # As int32 arrays: a Python integer is traced too, but as of no particular type.
        return tuple(np.int32(count) for count in self._criterion.quota((outputs, inputs), self.sparsities[index]))


class MaskFileStart:
    """Starting masks out of a masks.safetensors file.

    Raises:
        BarberError: names or shapes do not fit the model.
    """

    needs_stream = False

    def __init__(self, masks: Masks, checkpoint: Checkpoint, model: Model, pattern: SparsityPattern, devices: Devices):
        self._masks, self._model, self._pattern, self._devices = masks, model, pattern, devices
        check_fit(masks.shapes, model.pruned_names(), checkpoint, f"{masks.path}: mask")

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        masks = {path: self._masks.read(name) for path, name in self._model.kernel_names(index).items()}
        for path, mask in masks.items():
            check_pattern(mask, self._pattern, f"{self._masks.path}: {self._model.kernel_names(index)[path]}")
        return self._devices.masks(self._model.sub_blocks, masks), {}


class SparseCheckpointStart:
    """Starting masks from the zeros of a pruned checkpoint, starting weights from its other weights, and from its
    blocks' biases and norms where they are not the dense model's. What is outside blocks is not looked at.

    Args:
        file: where the masks are known: of a weight that is zero by chance the zeros do not tell that it is kept.

    Raises:
        BarberError: its weights' names or shapes do not fit the model.
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
        wanted = [name for index in range(model.layers) for name in model.names.of_block(index).values()]
        prefix = model.pruned_names()[0].partition(".0.")[0] + "."
        shapes = {name: sparse.shape(name) for name in sparse.names() if name.startswith(prefix)}
        # Anything else that is one-dimensional may be a buffer, as of rotary embeddings.
        known = set(wanted)
        held = {name: shape for name, shape in shapes.items() if len(shape) == 2 or name in known}
        check_fit(held, wanted, checkpoint, f"{sparse.location}: weight")
        if file:
            check_fit(file.shapes, model.pruned_names(), checkpoint, f"{file.path}: mask")

    def __call__(self, index: int, dense: Parameters, stream: Stream | None) -> tuple[BlockMasks, Parameters]:
        masks, weights = {}, {}
        for path, name in self._model.kernel_names(index).items():
            tensor = self._sparse.read(name)
            mask = self._file.read(name) if self._file else tensor != 0
            if self._file and np.any(tensor[~mask]):
                raise BarberError(
                    f"{self._sparse.location}: {name} is not zero everywhere that {self._file.path} prunes; "
                    "give the masks of that checkpoint"
                )
            check_pattern(mask, self._pattern, f"{self._sparse.location}: {name}")
            masks[path] = mask
            weights[path] = to_flax(path, tensor).astype(dense[path].dtype)
        for path, name in self._model.names.of_block(index).items():
            if path not in masks:
                own, given = self._checkpoint.read(name), self._sparse.read(name)
                # A copy in a narrower dtype is the same but for its rounding.
                if np.any(own.astype(given.dtype) != given):
                    weights[path] = to_flax(path, given).astype(own.dtype)
        sub_blocks = self._model.sub_blocks
        return self._devices.masks(sub_blocks, masks), self._devices.block(sub_blocks, weights)

    def sparsity(self) -> float:
        """Fraction of zeros in all prunable weights: reads them all, one at a time."""
        names = self._model.pruned_names()
        zeros = sum(int(np.count_nonzero(self._sparse.read(name) == 0)) for name in names)
        return zeros / sum(self._sparse.size(name) for name in names)


def check_fit(given: dict[str, tuple[int, ...]], names: Sequence[str], checkpoint: Checkpoint, what: str) -> None:
    """Raise BarberError unless names and shapes are those of the checkpoint's tensors `names`; `what` begins the
    line."""
    wanted = {name: checkpoint.shape(name) for name in names}
    for name in sorted(wanted.keys() ^ given.keys()):
        state = "is missing" if name in wanted else "is not of a weight to prune there"
        raise BarberError(f"{what} {name} {state}; it must be of the same model as {checkpoint.location}")
    for name, shape in wanted.items():
        if given[name] != shape:
            raise BarberError(f"{what} {name} has shape {list(given[name])}, in {checkpoint.location} {list(shape)}")


def check_pattern(mask: np.ndarray, pattern: SparsityPattern, what: str) -> None:
    """Raise BarberError unless the mask bool [out, in] keeps exactly N of every M."""
    pattern.check_inputs(mask.shape[1], what)
    if pattern.structured and not (mask.reshape(-1, pattern.of).sum(axis=1) == pattern.keep).all():
        raise BarberError(f"{what} does not keep {pattern.keep} of every {pattern.of} inputs; leave out --pattern")
