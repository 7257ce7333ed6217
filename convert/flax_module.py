"""A whole checkpoint as a Flax module with masks like its parameters, and back to a Hugging Face folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from barber_jax import __version__
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RECOVERED, RUN, FolderWriter, claimed
from barber_jax.convert.folder import FLOATS, ModelFolder
from barber_jax.convert.parameters import check_names_and_shapes, check_tensors, to_flax, to_hf, tree_paths
from barber_jax.convert.tied_head import copies
from barber_jax.masks.keep_pruned import masks_like
from barber_jax.masks.mask_file import FILE_NAME, Masks, read_masks
from barber_jax.masks.pattern import pattern_of
from barber_jax.models import build_model
from barber_jax.models.decoder import Decoder, nested
from barber_jax.models.family import Model, first_difference

SPARSE = 0.2
"""Fraction of zeros among the prunable weights from which a checkpoint without masks counts as pruned.

Dense weights have far fewer, but those of 4-bit files about a tenth.
"""


def load(
    ckpt: str | os.PathLike,
    *,
    masks: str | os.PathLike | None = None,
    dtype: Any = "float32",
    compute_dtype: Any = None,
) -> tuple[Decoder, dict]:
    """Load a checkpoint as one Flax NNX module, tensor by tensor, with the masks of its weights.

    Args:
        ckpt: a folder, a Hub id or a .gguf file.
        masks: a mask file, or a folder with one; the weights that it prunes become 0. None for the checkpoint's own
            masks: its masks.safetensors, or what else it says of masks, or its zeros if at least a fifth of the
            prunable weights are zero.
        dtype: of the parameters. The default, float32, is what training needs.
        compute_dtype: of the activations; None for `dtype`.

    Returns:
        The module, which maps int32 [S, L] token ids to float32 [S, L, vocabulary] logits, and the masks: nested dicts
        like `nnx.to_pure_dict(nnx.state(module, nnx.Param))`, NumPy bool [in, out] as its kernels, True = kept, and a
        single True for each parameter that is not pruned. If head and embedding are tied, the head has no parameter.

    Raises:
        BarberError: the checkpoint or the masks cannot be read, are damaged, or do not fit each other.
    """
    dtype = _floating("dtype", dtype)
    checkpoint = open_checkpoint(os.fspath(ckpt))
    model = build_model(checkpoint.config, _floating("compute_dtype", compute_dtype or dtype))
    check_tensors(checkpoint, model)
    file = open_masks(checkpoint, model, masks)
    prunable = set(model.pruned_names())
    parameters, kept, zeros = {}, {}, 0
    for path, name in tree_paths(model):
        tensor, mask = checkpoint.read(name), None
        if name in prunable:
            mask = file.read(name) if file else checkpoint.mask(name)
            if mask is None:
                mask = tensor != 0
                zeros += mask.size - int(mask.sum())
            elif masks is not None:
                tensor = np.where(mask, tensor, np.zeros((), tensor.dtype))
            else:
                check_zeros(checkpoint, name, tensor, mask)
        parameters[path] = _cast(to_flax(path, tensor), dtype, f"{checkpoint.location}: tensor {name}")
        kept[path] = np.True_ if mask is None else to_flax(path, mask)
    if file is None and zeros < SPARSE * sum(checkpoint.size(name) for name in prunable):
        own = {path for path, name in tree_paths(model) if name in prunable and checkpoint.mask(name) is None}
        kept |= dict.fromkeys(own, np.True_)
    graph, _ = nnx.split(nnx.eval_shape(lambda: model.decoder(nnx.Rngs(0))))
    module = nnx.merge(graph, nested(parameters))
    module.source = os.fspath(ckpt)
    return module, nested(kept)


def _floating(argument: str, given: Any) -> np.dtype:
    """The dtype, if it is one of floating point that arrays may have here, float64 with `jax_enable_x64` alone.

    Raises:
        BarberError: it is another, in which values would be lost.
    """
    known = (*FLOATS, *(["float64"] if jax.config.jax_enable_x64 else []))
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in known:
        raise BarberError(f"{argument} {given!r} is not one of {', '.join(known)}; give one of these")
    return dtype


def _cast(value: np.ndarray, dtype: np.dtype, what: str) -> jax.Array:
    """Copy to the device in another dtype. Raises BarberError if a value does not fit."""
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast).all():
        raise BarberError(f"{what} does not fit {dtype.name}; load it with dtype='float32'")
    return jnp.asarray(cast)


def check_zeros(checkpoint: Checkpoint, name: str, tensor: np.ndarray, mask: np.ndarray) -> None:
    """Raise BarberError unless a weight is zero wherever the mask that lies beside it prunes; both [out, in]."""
    if np.any(tensor[~mask]):
        raise BarberError(
            f"{checkpoint.location}: {name} is not zero everywhere that its {FILE_NAME} prunes; "
            "give the masks of this checkpoint, or delete that file"
        )


def open_masks(checkpoint: Checkpoint, model: Model, given: str | os.PathLike | None = None) -> Masks | None:
    """Open the mask file of a checkpoint: a given one, or masks.safetensors beside the weights; None without either.

    Raises:
        BarberError: the file cannot be read, or does not fit the model.
    """
    if given is not None:
        path = expand(os.fspath(given))
    elif isinstance(checkpoint, ModelFolder) and (checkpoint.folder / FILE_NAME).exists():
        path = checkpoint.folder / FILE_NAME
    else:
        return None
    masks = read_masks(path)
    check_names_and_shapes(masks.shapes, model.pruned_names(), checkpoint, f"{masks.path}: mask")
    return masks


def save(
    module: Decoder,
    masks: Any,
    out: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a module from `load` as a Hugging Face folder, with its masks.

    Tensors get the names, dtypes and files that they have in `like`, which also gives config.json and the tokenizer.
    If the masks are those of `like`, its masks.safetensors is copied byte for byte.

    Args:
        module: the model; its pruned weights must be 0.
        masks: as from `load`. None, or a single True, to write no mask file.
        out: the folder to write.
        like: a checkpoint of the same model; None for the one that the module was loaded from.
        overwrite: whether an earlier result at `out` is replaced.

    Raises:
        BarberError: a pruned weight is not 0, a value is not finite or does not fit its dtype, module, masks and `like`
            do not fit each other, or the folder cannot be written. Nothing is left at `out` then.
    """
    like = os.fspath(like if like is not None else module.source)
    if not like:
        raise BarberError("the module was not loaded from a checkpoint: name one of the same model with like=")
    out = Path(out)
    with claimed(out, overwrite, [expand(like)]):
        checkpoint = open_checkpoint(like)
        model = build_model(checkpoint.config, jnp.dtype("float32"))
        check_tensors(checkpoint, model)
        state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        parameters = _parameters(state, checkpoint, model)
        if module.settings and (differs := first_difference(module.settings, model.settings)):
            what, ours, theirs = differs
            raise BarberError(
                f"{checkpoint.location}: its {what} (config.json) is {theirs}, that of the module is {ours}; "
                "give a checkpoint of the same model with like="
            )
        kept = _kept(masks_like(state, np.True_ if masks is None else masks), model)
        _write(out, checkpoint, model, parameters, kept)


def _flat(tree: Any) -> dict[str, Any]:
    """Path in the decoder -> leaf of nested dicts."""
    return {
        ".".join(str(key.key) for key in keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _parameters(state: dict, checkpoint: Checkpoint, model: Model) -> dict[str, Callable[[], np.ndarray]]:
    """Hugging Face name -> reader of a parameter [out, in] in the checkpoint's dtype; checked against the model."""
    flat, readers = _flat(state), {}
    paths = dict(tree_paths(model))
    for path in sorted(flat.keys() ^ paths.keys()):
        where = "the module" if path in flat else checkpoint.location
        raise BarberError(f"only {where} has a parameter {path}; give a checkpoint of the same model with like=")
    for path, name in paths.items():
        shape = checkpoint.shape(name)
        if flat[path].shape != to_hf(path, np.empty(shape, np.bool_)).shape:
            raise BarberError(
                f"parameter {path} of the module has shape {list(flat[path].shape)}, its tensor {name} in "
                f"{checkpoint.location} {list(shape)}; give a checkpoint of the same model with like="
            )
        if not jnp.issubdtype(flat[path].dtype, jnp.floating):
            raise BarberError(f"parameter {path} of the module is {flat[path].dtype}, not floating-point; convert it")
        readers[name] = lambda path=path, name=name: _to_numpy(path, flat[path], checkpoint.dtype(name))
    return readers | {copy: readers[name] for name in readers for copy in copies(checkpoint, model, name)}


def _to_numpy(path: str, value: jax.Array, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return to_hf(path, np.asarray(value)).astype(dtype)


def _kept(full: dict, model: Model) -> dict[str, np.ndarray]:
    """Hugging Face name -> mask [out, in] of every prunable weight; {} if nothing is pruned.

    Raises:
        BarberError: a parameter that cannot be pruned has a mask.
    """
    names, kept = dict(tree_paths(model)), {}
    prunable = set(model.pruned_names())
    for path, mask in _flat(full).items():
        if np.ndim(mask) and names[path] in prunable:
            kept[names[path]] = to_hf(path, np.asarray(mask))
        elif np.ndim(mask) and not np.all(mask):
            raise BarberError(f"mask {path}: only the linears of the decoder blocks can be pruned; give True there")
    return kept


def _write(
    out: Path,
    checkpoint: Checkpoint,
    model: Model,
    parameters: dict[str, Callable[[], np.ndarray]],
    kept: dict[str, np.ndarray],
) -> None:
    """Write the folder, with one tensor at a time in memory."""
    file = open_masks(checkpoint, model) if kept else None
    for name in model.pruned_names() if kept else []:
        kept.setdefault(name, np.ones(checkpoint.shape(name), np.bool_))
    same = file is not None and all(np.array_equal(file.read(name), mask) for name, mask in kept.items())
    pattern, sparsity = ("unstructured", 0.0) if same or not kept else pattern_of(kept.values())
    names = () if same else [name for name in model.pruned_names() if name in kept]
    with FolderWriter(out, checkpoint, names, pattern, sparsity) as writer:
        for name, read in parameters.items():
            tensor = read()
            if name in kept and np.any(tensor[~kept[name]]):
                raise BarberError(
                    f"{name} is not zero everywhere that its mask prunes; train with keep_pruned, or apply "
                    "zero_pruned to the parameters first"
                )
            if name in kept and not same:
                writer.write_pruned(name, tensor, kept[name])
            else:
                writer.write(name, tensor)
        writer.finish(set(parameters))
        if same:
            file.copy(writer.folder / FILE_NAME)
        folder = checkpoint.folder if isinstance(checkpoint, ModelFolder) else None
        if folder and any((folder / name).exists() for name in (RUN, RECOVERED)):
            # The model card that a run has written, with figures of its weights.
            (writer.folder / "README.md").unlink(missing_ok=True)
        writer.write_json(RUN, {"saved": {"like": checkpoint.location, "barber_jax": __version__}})
        writer.publish()
