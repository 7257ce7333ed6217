"""Text to train on that the teacher writes itself, kept in a file so that a resumed run need not write it again."""

import hashlib
import os
import uuid
from pathlib import Path

import jax
import numpy as np

from barber_jax.console.files import expand, writing
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.forward.self_calibration import boundary_of, write_samples
from barber_jax.models.family import Model
from barber_jax.run.fingerprint import fingerprint


def self_text(
    teacher: Checkpoint,
    model: Model,
    devices: Devices,
    *,
    windows: int,
    length: int,
    seed: int,
    dtype: str,
    cache: Path,
    progress: Progress,
) -> Path:
    """Let the teacher write windows of text, and return the .npy file that holds them, int32 [windows, length].

    Args:
        teacher, model: the dense model.
        seed: of the draws, which are others than those of calibration samples of this seed.
        dtype: in which `model` computes.
        cache: folder of the file, which a later call for the same windows reads.
        progress: shows how far it is.

    Raises:
        BarberError: see `boundary_of` and `write_samples`; or the file cannot be written.
    """
    sizes = {"samples": windows, "length": length, "seed": int.from_bytes(_digest(f"text {seed}")[:4])}
    sources = [fingerprint(path) for path in teacher.sources()]
    path = expand(cache) / f"self-{_digest(f'{sizes} {devices.shape} {dtype} {sources}').hex()}.npy"
    # Several processes write together, and each of them its own file, if they share none.
    if path.is_file() and jax.process_count() == 1:
        return path
    boundary = boundary_of(teacher, model.vocabulary)
    progress.say(f"the teacher writes {windows} windows of {length} tokens")
    ids = write_samples(teacher, model, devices, **sizes, boundary=boundary, progress=progress)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{uuid.uuid4().hex}.npy")
        try:
            np.save(unfinished, ids)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
