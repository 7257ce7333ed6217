"""The lazy view of a checkpoint that every reader gives: configuration at once, tensors one by one when asked for.

Names, shapes and configuration are Hugging Face's whatever the file format, so nothing downstream knows formats.
"""

import abc
import math
import os
from pathlib import Path

import numpy as np

from barber_jax.console.errors import BarberError, DamagedInput

LARGEST_FILE = 5 * 10**9
"""Bytes of tensors in one safetensors file, where the source says nothing of files."""


class Checkpoint(abc.ABC):
    """A checkpoint opened for reading.

    Attributes:
        location: what the user called it, for messages.
        config: the content of Hugging Face's config.json.
        files: Hugging Face tensor name -> name of the safetensors file that holds it in an exported folder.
    """

    location: str
    config: dict
    files: dict[str, str]

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Every tensor's Hugging Face name."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """NumPy (ml_dtypes) dtype of a tensor, without reading it."""

    @abc.abstractmethod
    def fetch(self, name: str) -> np.ndarray:
        """Read one tensor from disk. Raises BarberError naming the file if it is damaged."""

    @abc.abstractmethod
    def sources(self) -> list[Path]:
        """Every file that decides what the checkpoint holds, in a fixed order; the tokenizer's are not among them."""

    @abc.abstractmethod
    def tokenizer(self):
        """The model's `transformers` tokenizer. Raises BarberError when there is none."""

    @abc.abstractmethod
    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files and the small configuration files that go with the model into `folder`.

        config.json is not among them. A checkpoint without a tokenizer writes nothing.
        """

    def size(self, name: str) -> int:
        """Number of elements of a tensor."""
        return math.prod(self.shape(name))

    def read(self, name: str) -> np.ndarray:
        """One tensor, refused if it holds NaN or Inf."""
        value = self.fetch(name)
        if not np.isfinite(value).all():
            raise DamagedInput(f"{self.location}: tensor {name} holds NaN or Inf: damaged; fetch the checkpoint again")
        return value


def open_checkpoint(spec: str) -> Checkpoint:
    """Open a local folder (safetensors, PyTorch .bin or Orbax), a .gguf file, or a Hub id.

    Of several formats in one folder, safetensors is read, then .bin.

    Raises:
        BarberError: nothing of the kind exists there, or it is damaged.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix == ".gguf" or (path.is_file() and _starts_with(path, b"GGUF")):
        from barber_jax.convert.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        raise BarberError(f"{spec}: neither a checkpoint folder nor a .gguf file; give one of these")
    from barber_jax.convert.download import download

    return _open_folder(download(spec), location=spec)


def _open_folder(folder: Path, location: str | None = None) -> Checkpoint:
    from barber_jax.convert.folder import ORBAX
    from barber_jax.convert.hf_folder import HFFolder
    from barber_jax.convert.torch_bin import TorchBinFolder

    for kind in (HFFolder, TorchBinFolder):
        if kind.found(folder):
            return kind(folder, location)
    if (folder / ORBAX).is_dir():
        from barber_jax.convert.orbax_folder import OrbaxCheckpoint

        return OrbaxCheckpoint(folder, location)
    # Says what is missing.
    return HFFolder(folder, location)


def split_files(sizes: dict[str, int], largest: int = LARGEST_FILE) -> dict[str, str]:
    """Which safetensors file each tensor goes to, in order, each file at most `largest` bytes of tensors.

    A single tensor larger than that gets a file of its own.
    """
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > largest:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{each:05d}-of-{number:05d}.safetensors" for name, each in numbers.items()}


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as handle:
        return handle.read(len(magic)) == magic
