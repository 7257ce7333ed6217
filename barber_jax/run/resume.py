"""Start or resume an unfinished run, which is identified by its options and by hashes of its inputs."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from barber_jax.console.errors import BarberError, DamagedInput
from barber_jax.console.files import expand
from barber_jax.console.options import flag
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.data.calibration import split_source
from barber_jax.devices.options import PROCESS_OPTIONS
from barber_jax.run.block_file import Block
from barber_jax.run.fingerprint import array_fingerprint, fingerprint
from barber_jax.run.run_state import RunState

NOT_COMPARED = (
    *("preset", "ckpt", "out", "format", "masks", "sparse_ckpt", "calibration", "text_field", "seed"),
    *("selection", "offload_activations", "compilation_cache", *PROCESS_OPTIONS),
    *("overwrite", "resume", "verbose", "eval_text", "eval_dataset", "eval_windows", "begin_token"),
)
"""Options that do not change the result, and options that name inputs, whose content is compared instead."""
STATE_VERSION = 2
"""Version of the records in a run state."""


def run_identity(
    options: Mapping[str, Any], checkpoint: Checkpoint, sparse: Checkpoint | None, ids: np.ndarray | None
) -> dict[str, Any]:
    """Values that must be the same for a run to be resumed: options that change its result, and hashes of its inputs.

    Args:
        options: all options by name, with defaults filled in.
        checkpoint: the dense checkpoint.
        sparse: the pruned checkpoint, if given.
        ids: int32 [S, L] calibration tokens, if any.
    """
    identity = {flag(name): value for name, value in options.items() if name not in NOT_COMPARED}
    identity["version of the run state"] = STATE_VERSION
    if options["reconstruct"] or options["refine_weighting"] == "gradient":
        # The seed also determines the order of training samples, and labels, not only the calibration samples.
        identity["--seed"] = options["seed"]
    if ids is not None and split_source(options["calibration"])[0]:
        # A resumed run takes the ids that the interrupted one has kept, so they do not tell whether these differ.
        identity |= {"--calibration": options["calibration"], "--seed": options["seed"]}
    for option, given in (("--ckpt", checkpoint), ("--sparse-ckpt", sparse)):
        if given:
            sources = given.sources()
            for path in sources:
                identity[f"content of {option} {os.path.relpath(path, sources[0].parent)}"] = fingerprint(path)
    if options["masks"]:
        identity["content of --masks"] = fingerprint(expand(options["masks"]))
    if ids is not None:
        identity["content of the calibration ids"] = array_fingerprint(ids)
    return identity


@contextlib.contextmanager
def open_state(
    folder: Path,
    identity: dict[str, Any],
    layers: int,
    say: Callable[[str], None],
    *,
    resume: bool,
    overwrite: bool,
    calibration: Block | None = None,
) -> Iterator[RunState]:
    """Context manager that opens the run state in `folder`, new or resumed.

    On an error the run state is kept if it holds finished blocks, calibration samples or the dense model's gradients,
    and a printed line says how to resume. Otherwise, or if an input is damaged, it is deleted.

    Args:
        identity: from `run_identity`.
        layers: number of blocks of the model.
        say: prints a line.
        resume: resume the unfinished run in `folder`.
        overwrite: allow replacing an unfinished run in `folder`.
        calibration: calibration samples for a new run state to keep, see `RunState.create`.

    Raises:
        BarberError: there is no run to resume or it has another identity; or `folder` holds an unfinished run and
            neither `resume` nor `overwrite` is set.
    """
    if resume:
        state = RunState.resume(folder, identity)
        if state.damaged is not None:
            say(f"{folder}: block {state.damaged} is damaged; it and all later blocks are computed again")
        say(f"resuming after {state.finished} of {layers} blocks")
    else:
        if not overwrite:
            refuse_unfinished(folder)
        state = RunState.create(folder, identity, calibration)
    with state:
        try:
            yield state
        except BaseException as error:
            kept = _kept(state, layers)
            if kept and not isinstance(error, DamagedInput):
                say(f"{kept} are kept in {folder}; the same command with --resume continues from there")
            else:
                state.remove()
            raise


def _kept(state: RunState, layers: int) -> str:
    """What a run state holds, in words; empty for nothing."""
    before = ["the calibration samples"] if state.keeps_calibration else []
    before += ["the gradients of the dense model"] if state.holds_gradients else []
    if not (before or state.finished):
        return ""
    blocks = f"{state.finished} of {layers} blocks"
    return f"{', '.join(before)} and {blocks}" if before else blocks


def refuse_unfinished(folder: Path) -> None:
    """Raise `BarberError` if a folder holds work of a run that a new one would replace."""
    if RunState.holds_work(folder):
        raise BarberError(f"{folder} holds an unfinished run; --resume continues it, --overwrite starts over")
