"""Calibration samples of a run: cut from text, written by the model itself, or half of each.

Samples that the model has written are kept with the unfinished run, so that a resumed run uses the same ones.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.export import sibling_path
from barber_jax.data.begin import BeginToken
from barber_jax.data.calibration import load_calibration, split_source
from barber_jax.devices.mesh import Devices, broadcast_arrays, is_primary
from barber_jax.forward.self_calibration import boundary_of, write_samples
from barber_jax.models.family import Model
from barber_jax.run.block_file import READ_ERRORS, Block
from barber_jax.run.identity import IDENTITY, no_run
from barber_jax.run.resume import refuse_unfinished
from barber_jax.run.run_state import RunState

FILE = "calibration.npy"


class Calibrated(Protocol):
    """Options of a command that calibrates: those of `CalibrationOptions`, and these."""

    calibration: str
    text_field: str
    samples: int
    length: int
    seed: int
    begin_token: BeginToken
    out: Path
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Calibration:
    """Calibration samples.

    Attributes:
        ids: int32 [samples, length] tokens.
        written: entry `written_calibration` of run.json; None if the model has written none of them.
    """

    ids: np.ndarray
    written: dict[str, Any] | None = None

    def block(self) -> Block:
        """The samples as an unfinished run keeps them."""
        return {"ids": self.ids}, self.written

    def save(self, folder: Path) -> None:
        """Write the samples as a file that `--calibration` takes."""
        path = folder / FILE
        with writing(path):
            np.save(path, self.ids)


def open_calibration(
    config: Calibrated, checkpoint: Checkpoint, model: Model, devices: Devices, progress: Progress
) -> Calibration:
    """Load the calibration samples, let the model write them, or take those that an interrupted run has kept.

    Raises:
        BarberError: see `load_calibration` and `write_samples`; or there is no run to resume, or one that a new run
            would replace.
    """
    written, text = split_source(config.calibration)
    if not written:
        return Calibration(_cut(config, text, config.samples, checkpoint, model, progress))
    folder = sibling_path(config.out, ".run")
    if config.resume:
        return _kept(folder)
    if is_primary() and not config.overwrite:
        # Before the long computation.
        refuse_unfinished(folder)
    count = config.samples if text is None else -(-config.samples // 2)
    cut = None if text is None else _cut(config, text, config.samples - count, checkpoint, model, progress)
    boundary, start = boundary_of(checkpoint, model.vocabulary), time.perf_counter()
    progress.say(f"the dense model writes {count} calibration samples of {config.length} tokens")
    sizes = {"samples": count, "length": config.length, "seed": config.seed}
    ids = write_samples(checkpoint, model, devices, **sizes, boundary=boundary, progress=progress)
    seconds = time.perf_counter() - start
    record = {"samples": count, "begins_with": boundary.kind, "token": boundary.token, "seconds": seconds}
    return Calibration(ids if cut is None else _alternating(ids, cut), record)


def _cut(
    config: Calibrated, source: str, samples: int, checkpoint: Checkpoint, model: Model, progress: Progress
) -> np.ndarray:
    """Samples cut from text, or rows of a file of ids: int32 [samples, length]."""
    return load_calibration(
        source,
        checkpoint.tokenizer,
        samples=samples,
        length=config.length,
        seed=config.seed,
        vocab_size=model.vocabulary,
        text_field=config.text_field,
        say=progress.say,
        begin=config.begin_token,
    )


def _alternating(written: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Written and cut samples in turn, so that there are both among the last ones, which stages hold out."""
    mixed = np.empty((len(written) + len(cut), written.shape[1]), np.int32)
    mixed[::2], mixed[1::2] = written, cut
    return mixed


def _kept(folder: Path) -> Calibration:
    """The samples that the interrupted run under `folder` has kept, on every process."""

    def read() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            return RunState.read_calibration(folder)
        except READ_ERRORS as error:
            if not (folder / IDENTITY).is_file():
                raise no_run(folder) from None
            raise BarberError(
                f"--resume: {folder} holds no calibration samples that the model has written, or damaged ones; give "
                "the --calibration of that run, or start over with --overwrite"
            ) from error

    arrays, record = broadcast_arrays(read)
    return Calibration(arrays["ids"], record)
