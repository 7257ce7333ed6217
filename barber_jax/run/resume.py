"""Where a crash is survived: which run a command is, and the unfinished run that it starts or resumes."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from barber_jax.console.errors import BarberError, DamagedInput
from barber_jax.console.options import flag
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.run.fingerprint import array_fingerprint, fingerprint
from barber_jax.run.run_state import RunState

NOT_COMPARED = (
    *("preset", "ckpt", "out", "format", "masks", "sparse_ckpt", "calibration", "text_field", "seed"),
    *("offload_activations", "compilation_cache", "coordinator", "processes", "process"),
    *("overwrite", "resume", "verbose", "eval_text", "eval_dataset", "eval_windows"),
)
"""Options that change no result, or only through what is read, whose content is compared instead."""
STATE_VERSION = 2
"""Of the records that an unfinished run keeps."""


def run_identity(
    options: Mapping[str, Any], checkpoint: Checkpoint, sparse: Checkpoint | None, ids: np.ndarray | None
) -> dict[str, Any]:
    """What must be the same for a run to be resumed: the options that change its result, and hashes of what it reads.

    Args:
        options: all of them by name, defaults filled in.
        checkpoint, sparse: the dense and, where given, the pruned checkpoint.
        ids: int32 [S, L] calibration tokens, if any.
    """
    identity = {flag(name): value for name, value in options.items() if name not in NOT_COMPARED}
    identity["version of the run state"] = STATE_VERSION
    if options["reconstruct"]:
        # The order of training samples depends on the seed too.
        identity["--seed"] = options["seed"]
    for option, given in (("--ckpt", checkpoint), ("--sparse-ckpt", sparse)):
        if given:
            sources = given.sources()
            for path in sources:
                identity[f"content of {option} {os.path.relpath(path, sources[0].parent)}"] = fingerprint(path)
    if options["masks"]:
        identity["content of --masks"] = fingerprint(options["masks"].expanduser())
    if ids is not None:
        identity["content of the calibration ids"] = array_fingerprint(ids)
    return identity


@contextlib.contextmanager
def open_state(
    folder: Path, identity: dict[str, Any], layers: int, say: Callable[[str], None], *, resume: bool, overwrite: bool
) -> Iterator[RunState]:
    """Open the run state under `folder`, new or resumed. On an error it is kept if it holds finished blocks, and a line
    says how to resume; otherwise it is deleted.

    Args:
        identity: from `run_identity`.
        layers: blocks of the whole run.
        say: prints a line.
        resume: resume the run that is there.
        overwrite: whether an unfinished run there may be replaced.

    Raises:
        BarberError: there is nothing to resume, or something that must not be lost.
    """
    if resume:
        state = RunState.resume(folder, identity)
        if state.damaged is not None:
            say(f"{folder}: block {state.damaged} is damaged; it and what came after it is computed again")
        say(f"resuming after {state.finished} of {layers} blocks")
    else:
        if not overwrite and RunState.holds_blocks(folder):
            raise BarberError(f"{folder} holds an unfinished run; --resume continues it, --overwrite starts anew")
        state = RunState.create(folder, identity)
    with state:
        try:
            yield state
        except BaseException as error:
            if state.finished and not isinstance(error, DamagedInput):
                kept = f"{state.finished} of {layers} blocks are kept in {folder}"
                say(f"{kept}; the same command with --resume continues from there")
            else:
                state.remove()
            raise
