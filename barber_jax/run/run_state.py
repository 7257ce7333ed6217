"""What an unfinished run has done, kept on disk so that a later run can go on from there.

FOLDER/identity.json says which run it is. FOLDER/0, FOLDER/1, ... are steps of an Orbax `CheckpointManager`: step N
holds block N and nothing else, in one safetensors file whose metadata carry the block's record and a checksum.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.run.block_file import DAMAGE, Block, BlockRestore, BlockSave

IDENTITY = "identity.json"
ITEM = "block"
"""What Orbax calls that which a step holds."""
HASH = "content of "
"""What the names of identity entries begin with that are hashes."""
NAMED = 8
"""Differing identity entries that an error names, at most."""


class RunState:
    """The finished blocks of a run; a context manager that closes it and leaves it on disk.

    Args:
        folder: where it is, with identity.json in it already.

    Attributes:
        folder: the same.
        finished: blocks 0 to finished - 1 are there, and whole.
        damaged: the first block that `resume` found damaged or missing before others, and dropped; else None.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.finished = 0
        self.damaged: int | None = None
        # Process 0 is alone in here, while the others compute: by default Orbax would wait for them at barriers.
        alone = ocp.options.MultiprocessingOptions(0, active_processes={0}, barrier_sync_key_prefix="run_state")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=False,
            save_root_metadata=False,
            # Orbax's own metadata of a step are not needed; of damaged ones it would complain on stderr.
            lightweight_initialize=True,
            # In the background an error would come out at the next block, and with a traceback on stderr.
            enable_async_checkpointing=False,
            multiprocessing_options=alone,
        )
        self._sweep()
        self._manager = ocp.CheckpointManager(folder, options=options)

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> "RunState":
        """Start anew, in place of whatever run there was.

        Args:
            folder: where; made with its parents if need be.
            identity: what must be the same to go on: name -> string, number, bool or None. Names of hashes begin with
                "content of ".

        Raises:
            BarberError: something else is there, or the disk refuses.
        """
        with writing(folder):
            _delete(folder)
            folder.mkdir(parents=True)
            try:
                partial = _partial(folder)
                with open(partial, "w", encoding="utf-8") as file:
                    json.dump(identity, file, indent=2)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, folder / IDENTITY)
                return cls(folder)
            except BaseException:
                # Ctrl-C too: nobody has it yet who could remove it.
                shutil.rmtree(folder, ignore_errors=True)
                raise

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, Any]) -> "RunState":
        """Go on with the run that is there. Every block is read, one at a time; from the first that is damaged or
        missing on, they are deleted.

        Raises:
            BarberError: no run is there, or one of another identity.
        """
        _check_identity(folder, identity)
        with writing(folder):
            state = cls(folder)
            steps = state._manager.all_steps()
            while state.finished in steps and state._is_whole(state.finished):
                state.finished += 1
            if len(steps) > state.finished:
                state.damaged = state.finished
            for step in steps[state.finished :]:
                state._manager.delete(step)
        return state

    @staticmethod
    def holds_blocks(folder: Path) -> bool:
        """Whether a run has left finished blocks there."""
        return (folder / IDENTITY).is_file() and any(_is_step(path) for path in folder.iterdir())

    def commit(self, index: int, arrays: dict[str, np.ndarray], record: dict) -> None:
        """Keep a block; when this returns, it survives the death of the process.

        Not synced to the disk: should the power fail, the checksum tells what has arrived there.

        Args:
            index: of the block; must be `finished`.
            arrays: of any dtype that safetensors has.
            record: JSON.

        Raises:
            BarberError: the disk refuses.
        """
        if index != self.finished:
            raise ValueError(f"block {index} is committed where {self.finished} is next")
        try:
            with writing(self.folder / str(index)):
                self._manager.save(index, args=ocp.args.Composite(**{ITEM: BlockSave((arrays, record))}), force=True)
        except BaseException:
            with contextlib.suppress(OSError):
                self._sweep()
            raise
        self.finished += 1

    def load(self, index: int) -> Block:
        """Arrays and record of a finished block, in the order in which they were given.

        Raises:
            BarberError: it has become damaged since `resume`.
        """
        if not 0 <= index < self.finished:
            raise ValueError(f"block {index} is not among the {self.finished} finished ones")
        try:
            return self._read(index)
        except DAMAGE as error:
            place = self.folder / str(index)
            raise BarberError(f"{place}: damaged ({_gist(error)}); --resume computes it again") from error

    def close(self) -> None:
        """Let go of it; what is on disk stays. Closing twice is harmless."""
        self._manager.close()

    def remove(self) -> None:
        """Close it and delete it from disk; cut short, it can be called again."""
        self.finished = 0
        self.close()
        with writing(self.folder):
            _delete(self.folder)

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _read(self, index: int) -> Block:
        return self._manager.restore(index, args=ocp.args.Composite(**{ITEM: BlockRestore()}))[ITEM]

    def _is_whole(self, index: int) -> bool:
        try:
            self._read(index)
        except PermissionError as error:
            raise BarberError(f"cannot read {self.folder / str(index)}: {error.strerror}; mend that") from error
        except DAMAGE:
            return False
        return True

    def _sweep(self) -> None:
        """Delete what a commit that was cut short has left."""
        for path in self.folder.iterdir():
            if path.name != IDENTITY and not _is_step(path):
                _delete_tree(path)


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise BarberError unless the run there has this identity."""
    path = folder / IDENTITY
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except (FileNotFoundError, NotADirectoryError):
        raise BarberError(f"--resume: no unfinished run under {folder}; leave --resume out to start one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BarberError(f"--resume: {path}: cannot be read ({_gist(error)}); start anew with --overwrite") from None
    given = json.loads(json.dumps(identity))
    differing = [name for name in given | stored if given.get(name) != stored.get(name)]
    if not differing:
        return
    said = [
        f"{name} differs from that of the run under {folder}"
        if name.startswith(HASH)
        else f"{name} was {stored.get(name)} in the run under {folder}, now {given.get(name)}"
        for name in differing[:NAMED]
    ]
    if len(differing) > NAMED:
        said.append(f"and so on, {len(differing)} in all")
    raise BarberError(f"--resume: {'; '.join(said)}; give the same or start anew with --overwrite")


def _gist(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _partial(folder: Path) -> Path:
    return folder / f"{IDENTITY}.partial"


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def _delete(folder: Path) -> None:
    """Delete a run state, identity.json last: cut short, it is still known for one."""
    if not folder.exists():
        return
    entries = set(folder.iterdir()) - {_partial(folder)}
    if entries and folder / IDENTITY not in entries:
        raise BarberError(f"{folder} is in the way: it is no unfinished run; move it or choose another --out")
    for path in entries - {folder / IDENTITY}:
        _delete_tree(path)
    shutil.rmtree(folder)


def _delete_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
