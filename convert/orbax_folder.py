"""Reads and writes Orbax checkpoints: the Flax parameter tree of a whole `Decoder`, and its masks.

DIR/orbax holds one tree that `orbax.checkpoint.PyTreeCheckpointer().restore` returns as nested dicts:

    params: embed.*, layers.N.*, head.*   the parameters of `models.decoder.Decoder`; a kernel is [in, out]
    masks:  layers.N.*.kernel             bool [in, out], True = kept; only if the model was pruned

Keys are strings (`flax.nnx.restore_int_paths` converts those of `layers` to integers). If the head is tied to the token
embedding, head.lm_head.kernel is not stored. DIR also holds config.json and the tokenizer's files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from barber_jax.console.errors import BarberError
from barber_jax.console.files import FileState
from barber_jax.console.quiet import ignore_lost_tasks, silenced
from barber_jax.convert.checkpoint import Checkpoint, split_files
from barber_jax.convert.folder import FLOATS, ORBAX, ModelFolder
from barber_jax.convert.parameters import to_flax, to_hf, tree_paths
from barber_jax.convert.tied_head import HEAD, settle_head
from barber_jax.masks.mask_file import Masks
from barber_jax.models import build_model

HEAD_PATH = "head.lm_head.kernel"
"""Path of the head in the tree."""


class OrbaxCheckpoint(ModelFolder):
    """A folder with config.json and an `orbax` subfolder; each tensor is read when it is fetched."""

    def __init__(self, folder: Path, location: str | None = None):
        """Open `folder`.

        Raises:
            BarberError: the tree is damaged, or does not match config.json.
        """
        super().__init__(folder, location)
        self._tree = self.folder.resolve() / ORBAX
        self._states = [FileState(path) for path in self.sources()[1:]]
        self._stored = self._metadata()
        model = build_model(self.config, jnp.float32)
        # Of a tied pair either side may be stored, or both.
        head = {HEAD: HEAD_PATH} if model.tied_embedding and HEAD_PATH in self._stored else {}
        self._paths: dict[str, str] = {}
        # In model order: a wrong number of layers must fail at the first missing tensor, not list billions of names.
        for path, name in tree_paths(model):
            if path in self._stored:
                self._paths[name] = path
            elif not head or name != model.names.head["lm_head.kernel"]:
                raise BarberError(
                    f"{self._tree}: tensor params.{path} is missing; write the folder again or fix config.json"
                )
        self._paths |= head
        unknown = self._stored.keys() - self._paths.values()
        if unknown:
            raise BarberError(f"{self._tree}: tensor params.{min(unknown)} does not belong to the model in config.json")
        self._paths = settle_head(self, self._paths)
        self.files = split_files({name: self.size(name) * self.dtype(name).itemsize for name in self._paths})

    def sources(self) -> list[Path]:
        return [self.folder / "config.json", *sorted(path for path in self._tree.rglob("*") if path.is_file())]

    def names(self) -> list[str]:
        return list(self._paths)

    def shape(self, name: str) -> tuple[int, ...]:
        path = self._paths[name]
        shape = tuple(self._stored[path].shape)
        return shape[::-1] if path.endswith(".kernel") else shape

    def dtype(self, name: str) -> np.dtype:
        given = np.dtype(self._stored[self._paths[name]].dtype)
        if given not in FLOATS.values():
            raise BarberError(
                f"{self._tree}: tensor {name} has dtype {given}; known: {', '.join(FLOATS)}; save it as one"
            )
        return given

    def fetch(self, name: str) -> np.ndarray:
        path = self._paths[name]
        key = ("params", *path.split("."))
        try:
            with silenced("absl"):
                tree = _checkpointer().restore(
                    self._tree,
                    args=ocp.args.PyTreeRestore(
                        item=unflatten_dict({key: 0}),
                        restore_args=unflatten_dict({key: ocp.RestoreArgs(restore_type=np.ndarray)}),
                        partial_restore=True,
                    ),
                )
        except Exception as error:
            # Orbax passes on exceptions of TensorStore and of the file system, of many types.
            raise self._damaged(error) from None
        for state in self._states:
            state.check()
        return to_hf(path, flatten_dict(tree)[key])

    def _metadata(self) -> dict:
        """Parameter path -> its Orbax metadata (shape and dtype), without reading any parameter."""
        try:
            with silenced("absl"):
                metadata = _checkpointer().metadata(self._tree).item_metadata
            if metadata is None:
                raise ValueError("its metadata cannot be read")
            params = metadata.tree["params"]
            return {".".join(key): entry for key, entry in flatten_dict(params).items()}
        except Exception as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> BarberError:
        cause = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return BarberError(
            f"{self._tree}: not an Orbax checkpoint written by barber_jax, or damaged ({cause}); write it again"
        )


@dataclass(frozen=True)
class _LazyArray:
    """An array of the tree that is read only when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _SequentialHandler(ocp.type_handlers.NumpyHandler):
    """Reads and writes one array at a time, where Orbax's own handler processes all arrays concurrently.

    Concurrent writes would need the whole tree in memory. If one of several concurrent reads failed, Python would
    report on stderr that the others were never awaited.
    """

    async def metadata(self, infos):
        return [entry for info in infos for entry in await super(_SequentialHandler, self).metadata([info])]

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def write_orbax(folder: Path, checkpoint: Checkpoint, masks: Masks | None) -> None:
    """Write a checkpoint's parameters and masks to `folder`/orbax, with one tensor in memory at a time.

    Tensors without a parameter in the model (a tied head's copy, stored rotary frequencies) are left out.

    Raises:
        BarberError: a tensor is damaged, a mask does not match the model, or the folder cannot be written.
    """
    paths = {name: path for path, name in tree_paths(build_model(checkpoint.config, jnp.float32))}
    leaves = {f"params.{path}": _parameter(checkpoint, name, path) for name, path in paths.items()}
    for name in masks.names() if masks else []:
        if name not in paths or masks.shapes[name] != checkpoint.shape(name):
            raise BarberError(f"{masks.path}: the mask of {name} fits no weight of {checkpoint.location}")
        leaves[f"masks.{paths[name]}"] = _mask(masks, name, paths[name])
    target, tree = folder.resolve() / ORBAX, unflatten_dict({tuple(path.split(".")): v for path, v in leaves.items()})
    ignore_lost_tasks()
    try:
        # Of an error Orbax logs the traceback too.
        with silenced("absl"):
            _checkpointer().save(target, args=ocp.args.PyTreeSave(tree))
    except BarberError:
        raise
    except Exception as error:
        # Orbax passes on exceptions of TensorStore and of the file system, of many types.
        cause = str(error).strip().split("\n")[0][:200]
        raise BarberError(f"cannot write {target}: {cause}; make room there or write to another place") from None


def _parameter(checkpoint: Checkpoint, name: str, path: str) -> _LazyArray:
    shape = checkpoint.shape(name)
    flax_shape = shape[::-1] if path.endswith(".kernel") else shape
    return _LazyArray(flax_shape, checkpoint.dtype(name), lambda: to_flax(path, checkpoint.read(name)))


def _mask(masks: Masks, name: str, path: str) -> _LazyArray:
    return _LazyArray(masks.shapes[name][::-1], np.dtype(np.bool_), lambda: to_flax(path, masks.read(name)))


def _checkpointer() -> ocp.Checkpointer:
    """A checkpointer for trees of arrays and `_LazyArray`s."""
    handler = _SequentialHandler()
    # Orbax warns if there is no handler for jax.Array.
    others = (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry((_LazyArray, handler), (np.ndarray, handler), others)
    # Every process reads and writes on its own; by default, Orbax synchronises all processes.
    process = jax.process_index()
    independent = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
    )
    tree = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=independent)
    return ocp.Checkpointer(tree, multiprocessing_options=independent)
