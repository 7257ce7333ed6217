"""Finished blocks of an unfinished run, stored on disk so that the run can be resumed.

FOLDER/identity.json identifies the run; FOLDER/calibration holds its calibration samples if the model has written them
itself. FOLDER/0, FOLDER/1, ... are steps of an Orbax `CheckpointManager`: step N holds block N only, in one safetensors
file whose metadata hold the block's record and a checksum. Beside them are the files of `gradient_file`, where the run
uses gradients of the dense model.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.run.block_file import READ_ERRORS, Block, BlockHandler, BlockRestore, BlockSave
from barber_jax.run.gradient_file import TOKENS, WEIGHTS
from barber_jax.run.identity import IDENTITY, check_identity, delete_run, delete_tree, first_line, write_identity

ITEM = "block"
"""Name of the Orbax item in each step."""
CALIBRATION = "calibration"
"""Folder of the calibration samples."""
SWEEPS = (WEIGHTS, TOKENS)
"""Files that a finished sweep through the dense model leaves."""


class RunState:
    """The finished blocks of a run on disk. As a context manager it closes the run state but does not delete it.

    Args:
        folder: folder of the run state, which already holds identity.json.

    Attributes:
        folder: folder of the run state.
        finished: number of finished blocks: blocks 0 to finished - 1 are stored and undamaged.
        damaged: first block that `resume` found damaged, or missing although later ones exist; else None.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.finished = 0
        self.damaged: int | None = None
        # Only process 0 uses the run state: by default Orbax would wait for the other processes at barriers.
        only_primary = ocp.options.MultiprocessingOptions(0, active_processes={0}, barrier_sync_key_prefix="run_state")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=False,
            save_root_metadata=False,
            # Do not read Orbax's own metadata of the steps: it would print warnings about damaged ones to stderr.
            lightweight_initialize=True,
            # Asynchronously, an error would be raised only at the next block, with a traceback on stderr.
            enable_async_checkpointing=False,
            multiprocessing_options=only_primary,
        )
        self._delete_leftovers()
        self._manager = ocp.CheckpointManager(folder, options=options)

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any], calibration: Block | None = None) -> "RunState":
        """Create an empty run state, replacing one that exists in the folder.

        Args:
            folder: created with its parents if it does not exist.
            identity: see `write_identity`.
            calibration: calibration samples to keep, for `read_calibration`.

        Raises:
            BarberError: the folder holds something other than a run state, or cannot be written.
        """
        with writing(folder):
            delete_run(folder)
            folder.mkdir(parents=True)
            try:
                write_identity(folder, identity)
                if calibration is not None:
                    (folder / CALIBRATION).mkdir()
                    BlockHandler().save(folder / CALIBRATION, BlockSave(calibration))
                return cls(folder)
            except BaseException:
                # Also on Ctrl-C: the caller has no object yet on which to call `remove`.
                shutil.rmtree(folder, ignore_errors=True)
                raise

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, Any]) -> "RunState":
        """Open an existing run state.

        Reads every block, one at a time, and deletes the blocks from the first damaged or missing one on.

        Raises:
            BarberError: the folder holds no run state, or one with another identity.
        """
        check_identity(folder, identity)
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
    def holds_work(folder: Path) -> bool:
        """Whether the folder holds a run state with finished blocks, written samples or gradients of the model."""
        if not (folder / IDENTITY).is_file():
            return False
        return any(_is_step(path) or path.name in (CALIBRATION, *SWEEPS) for path in folder.iterdir())

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of the dense model were computed."""
        return any((self.folder / name).exists() for name in SWEEPS)

    @staticmethod
    def read_calibration(folder: Path) -> Block:
        """Read the calibration samples that the run under `folder` keeps. Raises one of `READ_ERRORS` if it cannot."""
        return BlockHandler().restore(folder / CALIBRATION, BlockRestore())

    @property
    def keeps_calibration(self) -> bool:
        """Whether the folder holds calibration samples."""
        return (self.folder / CALIBRATION).is_dir()

    def commit(self, index: int, arrays: dict[str, np.ndarray], record: dict) -> None:
        """Store a finished block. When this returns, the block survives a crash of the process.

        The files are not synced to disk. After a power failure the checksum shows whether a block was written.

        Args:
            index: of the block; must be equal to `finished`.
            arrays: name -> array of a dtype that safetensors supports.
            record: JSON-serialisable.

        Raises:
            BarberError: the block cannot be written.
        """
        if index != self.finished:
            raise ValueError(f"block {index} is committed, but {self.finished} is next")
        try:
            with writing(self.folder / str(index)):
                self._manager.save(index, args=ocp.args.Composite(**{ITEM: BlockSave((arrays, record))}), force=True)
        except BaseException:
            with contextlib.suppress(OSError):
                self._delete_leftovers()
            raise
        self.finished += 1

    def load(self, index: int) -> Block:
        """Load the arrays of a finished block, in the order in which they were committed, and its record.

        Raises:
            BarberError: the block was damaged after `resume`.
        """
        if not 0 <= index < self.finished:
            raise ValueError(f"block {index} is not among the {self.finished} finished ones")
        try:
            return self._read(index)
        except READ_ERRORS as error:
            path = self.folder / str(index)
            raise BarberError(f"{path}: damaged ({first_line(error)}); --resume computes it again") from error

    def close(self) -> None:
        """Close the run state without deleting it. May be called more than once."""
        self._manager.close()

    def remove(self) -> None:
        """Close the run state and delete it from disk. May be called again after an interruption."""
        self.finished = 0
        self.close()
        with writing(self.folder):
            delete_run(self.folder)

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
            path = self.folder / str(index)
            raise BarberError(f"cannot read {path}: {error.strerror}; make it readable") from error
        except READ_ERRORS:
            return False
        return True

    def _delete_leftovers(self) -> None:
        """Delete the files of an interrupted commit."""
        for path in self.folder.iterdir():
            if path.name not in (IDENTITY, CALIBRATION, *SWEEPS) and not _is_step(path):
                delete_tree(path)


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()
