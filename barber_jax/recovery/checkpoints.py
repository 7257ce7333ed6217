"""Checkpoints of an unfinished recovery: weights, moments, the position in the text and what was measured.

FOLDER/identity.json identifies the run. FOLDER/N is a step of an Orbax `CheckpointManager`. The latest step is kept,
and the one with the best weights; an older one is deleted only when a newer one is complete.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import xxhash
from jax import lax
from jax.experimental import multihost_utils

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.console.quiet import ignore_lost_tasks, silenced
from barber_jax.devices.mesh import broadcast_from_primary, is_primary
from barber_jax.models.sharding import constrain
from barber_jax.recovery.training import State
from barber_jax.run.identity import check_identity, delete_run, first_line, write_identity

STATE, PROGRESS = "state", "progress"
"""Orbax items of a step: arrays, and what JSON holds."""
SUMS, DIGEST = "sums", "digest"
"""Entries of the progress: sums of the bits of the arrays, and a hash of all its other entries. Neither TensorStore nor
Orbax has checksums of its own."""


class DamagedRun(BarberError):
    """A checkpoint of an unfinished run is damaged: it cannot be resumed."""


class Checkpoints:
    """The checkpoints of one run. A context manager that closes them but does not delete them.

    Args:
        folder: folder of the run, which exists.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=False,
            save_root_metadata=False,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        ignore_lost_tasks()
        self._manager = ocp.CheckpointManager(folder, options=options)

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any], overwrite: bool) -> "Checkpoints":
        """Start with no checkpoints, in a folder that is created.

        Raises:
            BarberError: the folder holds checkpoints and `overwrite` is not set, or holds something else, or cannot be
                written.
        """

        def make() -> str | None:
            try:
                if not overwrite and any(path.name.isdecimal() for path in folder.glob("*")):
                    return f"{folder} holds an unfinished run; --resume continues it, --overwrite starts over"
                with writing(folder):
                    delete_run(folder)
                    folder.mkdir(parents=True)
                    write_identity(folder, identity)
            except BarberError as error:
                return str(error)
            return None

        _raise(broadcast_from_primary(make))
        return cls(folder)

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, Any]) -> "Checkpoints":
        """Open the checkpoints of an unfinished run. Raises `BarberError` if there is none, or another one."""

        def check() -> str | None:
            try:
                check_identity(folder, identity)
            except BarberError as error:
                return str(error)
            return None

        _raise(broadcast_from_primary(check))
        return cls(folder)

    def steps(self) -> list[int]:
        """Steps of which there are checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, progress: dict, keep: set[int]) -> None:
        """Write a checkpoint; when it is complete, delete all others but those of the steps in `keep`.

        Args:
            progress: the position in the text and what was measured so far; JSON-serialisable.

        Raises:
            BarberError: it cannot be written; earlier checkpoints stay.
        """
        leaves = _leaves(state)
        progress = {**progress, SUMS: _sums(leaves)}
        progress[DIGEST] = _digest(progress)
        arguments = {STATE: ocp.args.StandardSave(leaves), PROGRESS: ocp.args.JsonSave(progress)}
        try:
            # Orbax may swallow what a signal raises.
            with writing(self.folder / str(step)), interrupt.deferred(), silenced("absl"):
                if step not in self._manager.all_steps():
                    self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        except (ValueError, RuntimeError) as error:
            # TensorStore raises these, for a full disk too.
            raise BarberError(
                f"cannot write {self.folder / str(step)} ({first_line(error)}); free some space there"
            ) from error
        for old in self.steps():
            if old != step and old not in keep:
                self._manager.delete(old)

    def restore(self, step: int, like: State) -> tuple[State, dict]:
        """Read a checkpoint.

        Args:
            like: a state of the same structure, shapes and shardings.

        Raises:
            DamagedRun: it is damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(like))
        arguments = {STATE: ocp.args.StandardRestore(abstract), PROGRESS: ocp.args.JsonRestore()}
        try:
            with silenced("absl"):
                found = self._manager.restore(step, args=ocp.args.Composite(**arguments))
            leaves, progress = found[STATE], found[PROGRESS]
            if progress.pop(DIGEST) != _digest(progress):
                raise ValueError("its progress is not what was written")
            if progress[SUMS] != _sums(leaves):
                raise ValueError("its arrays are not those that were written")
        except Exception as error:
            # Orbax and TensorStore raise errors of many types for a damaged checkpoint.
            raise DamagedRun(
                f"{self.folder / str(step)}: damaged ({first_line(error)}); start over with --overwrite"
            ) from error
        flat = [leaves["optimizer"][name] for name in sorted(leaves["optimizer"], key=int)]
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), flat)
        return State(leaves["values"], optimizer, leaves["step"]), progress

    def close(self) -> None:
        """Close without deleting anything. May be called more than once."""
        self._manager.close()

    def remove(self) -> None:
        """Close the checkpoints and delete them."""
        self.close()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("recovered")
        if is_primary():
            with writing(self.folder):
                delete_run(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _raise(message: str | None) -> None:
    if message:
        raise BarberError(message)


def _leaves(state: State) -> dict[str, Any]:
    """The state as nested dicts of arrays: Orbax need not know optax's types."""
    numbered = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    return {**{field.name: getattr(state, field.name) for field in dataclasses.fields(state)}, "optimizer": numbered}


def _sums(leaves: dict[str, Any]) -> dict[str, int]:
    """Path -> sum of the bits of an array of 32-bit numbers, as 32-bit integers; one changed bit changes it."""
    found = _bit_sums(leaves)
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree.leaves_with_path(found)}


def _digest(progress: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(progress, sort_keys=True).encode())


@jax.jit
def _bit_sums(leaves: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: constrain(jnp.sum(lax.bitcast_convert_type(leaf, jnp.uint32))), leaves)
