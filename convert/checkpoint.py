"""The interface of every checkpoint reader: the configuration is read at once, each tensor when it is needed.

Tensor names, shapes and configuration are Hugging Face's for every file format, so users of a checkpoint need not know
the format.
"""

import abc
import math
from pathlib import Path

import numpy as np

from barber_jax.console import documents
from barber_jax.console.errors import BarberError, DamagedInput
from barber_jax.console.files import expand

MAX_FILE_BYTES = 5 * 10**9
"""Maximum bytes of tensors in one exported safetensors file, where the source has no shard layout of its own."""


class Checkpoint(abc.ABC):
    """A checkpoint opened for reading.

    Attributes:
        location: path or Hub id as the user gave it, for messages.
        config: the content of Hugging Face's config.json.
        files: Hugging Face tensor name -> name of the safetensors file that holds it in an exported folder.
    """

    location: str
    config: dict
    files: dict[str, str]

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of all tensors."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """NumPy dtype of a tensor (bfloat16 from ml_dtypes), without reading it."""

    @abc.abstractmethod
    def fetch(self, name: str) -> np.ndarray:
        """Read one tensor from disk. Raises BarberError, which names the file, if the file is damaged."""

    @abc.abstractmethod
    def sources(self) -> list[Path]:
        """Files that hold the configuration and the tensors, in a fixed order; tokenizer files are not listed."""

    @abc.abstractmethod
    def tokenizer(self):
        """Load the model's `transformers` tokenizer. Raises BarberError if there is none."""

    @abc.abstractmethod
    def save_tokenizer(self, folder: Path) -> str | None:
        """Write the tokenizer's files, and small files such as generation_config.json, to `folder`.

        config.json is not written. Files that the checkpoint does not have are skipped.

        Returns:
            Why no tokenizer is written although the checkpoint has one, as a line; else None.
        """

    def mask(self, name: str) -> np.ndarray | None:
        """The mask of a tensor, bool, True = kept, where the checkpoint itself holds one; else None."""
        return None

    def size(self, name: str) -> int:
        """Number of elements of a tensor."""
        return math.prod(self.shape(name))

    def read(self, name: str) -> np.ndarray:
        """Read one tensor. Raises DamagedInput if it contains NaN or Inf."""
        value = self.fetch(name)
        if not np.isfinite(value).all():
            raise DamagedInput(f"{self.location}: tensor {name} holds NaN or Inf: damaged; fetch the checkpoint again")
        return value


def open_checkpoint(spec: str) -> Checkpoint:
    """Open a local folder (safetensors, PyTorch .bin or Orbax), a .gguf file, or a Hub id.

    In a folder with several formats, safetensors takes precedence, then .bin.

    Raises:
        BarberError: `spec` is none of these, or it is damaged.
    """
    path = expand(spec)
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
        if kind.has_weights(folder):
            _refuse_model_with_adapter(folder, location)
            return kind(folder, location)
    if (folder / ORBAX).is_dir():
        from barber_jax.convert.orbax_folder import OrbaxCheckpoint

        return OrbaxCheckpoint(folder, location)
    _refuse_adapter(folder, location or str(folder))
    found = min(folder.glob("*.gguf"), default=None)
    if found:
        raise BarberError(f"{location or folder}: holds a GGUF file; give {found} itself")
    # Raises an error that names the missing file.
    return HFFolder(folder, location)


def _refuse_model_with_adapter(folder: Path, location: str | None) -> None:
    """Raise BarberError if a folder holds a model and a PEFT adapter, which transformers applies to it.

    From the Hub (`location` is given) transformers takes the adapter and its own base model instead; the adapter's
    weights are not fetched here. A configuration without weights is a leftover.
    """
    weights = any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin"))
    if (folder / "adapter_config.json").is_file() and (weights or location):
        raise BarberError(
            f"{location or folder}: holds a model and a PEFT adapter beside it; merge them with PEFT's "
            "merge_and_unload(), save that and give its folder; for the model alone give a folder without "
            "adapter_config.json"
        )


def _refuse_adapter(folder: Path, location: str) -> None:
    """Raise BarberError if a folder without weights of a model holds a PEFT adapter."""
    if not (folder / "adapter_config.json").is_file():
        return
    try:
        base = documents.read(folder / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    model = f" {base}" if isinstance(base, str) and len(base) < 200 else ""
    raise BarberError(
        f"{location}: a PEFT adapter, not a model; merge it into its base model{model} with PEFT's merge_and_unload(), "
        "save that and give its folder"
    )


def split_files(sizes: dict[str, int], largest: int = MAX_FILE_BYTES) -> dict[str, str]:
    """Assign tensors, in order, to safetensors files of at most `largest` bytes of tensors each.

    A tensor larger than that gets a file of its own.

    Args:
        sizes: tensor name -> bytes.

    Returns:
        Tensor name -> file name.
    """
    shards, shard, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > largest:
            shard, filled = shard + 1, 0
        shards[name] = shard
        filled += size
    if shard == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{index:05d}-of-{shard:05d}.safetensors" for name, index in shards.items()}


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as handle:
        return handle.read(len(magic)) == magic
