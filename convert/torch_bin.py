"""Reads PyTorch checkpoint folders: pytorch_model.bin or its shards. PyTorch is imported only to open one."""

import pickle
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched
from barber_jax.convert.folder import FLOATS, ShardedFolder

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
MIN_TORCH_VERSION = (2, 6)
"""First version whose weights_only=True cannot be made to run code (CVE-2025-32434)."""


class TorchBinFolder(ShardedFolder):
    """A folder with config.json and one or more .bin files written by `torch.save`.

    Files are memory-mapped, so that only the requested tensor is read. Files written by PyTorch before 1.6 cannot be
    mapped; one of them at a time is held in memory.
    """

    weights = WEIGHTS
    index = INDEX
    dtypes: ClassVar = {f"torch.{name}": dtype for name, dtype in FLOATS.items()}

    def __init__(self, folder: Path, location: str | None = None):
        """Open `folder`.

        Raises:
            BarberError: PyTorch is missing or too old, or a file is damaged or contains more than tensors.
        """
        self._torch = _import_torch(location or str(folder))
        self._unmapped: tuple[Path | None, dict] = (None, {})
        super().__init__(folder, location)

    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._load(self.folder / file).items()
        }

    def _fetch(self, path: Path, name: str) -> np.ndarray:
        # Reloaded for each tensor: while a file stays mapped, resident memory can grow to the checkpoint's size.
        tensor = self._load(path).get(name)
        if tensor is None:
            raise _damaged(path, f"tensor {name} is gone")
        try:
            bits = tensor.detach().contiguous()
            if tensor.dtype == self._torch.bfloat16:
                # PyTorch cannot convert bfloat16 to NumPy; reinterpret the bits.
                return bits.view(self._torch.int16).numpy().view(FLOATS["bfloat16"]).copy()
            return bits.numpy().copy()
        except (RuntimeError, TypeError) as error:
            raise _damaged(path, error) from None

    def _exported(self, file: str) -> str:
        return f"{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"

    def _load(self, path: Path) -> dict:
        """Load a file: tensor name -> tensor."""
        held, state = self._unmapped
        if held == path:
            return state
        check_fetched(path)
        try:
            with open(path, "rb") as handle:
                mapped = handle.read(4) == b"PK\x03\x04"
            state = self._torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            # A damaged file can raise any exception of the pickle or zip reader.
            raise _load_error(path, error) from None
        self._check(path, state)
        if not mapped:
            self._unmapped = (path, state)
        return state

    def _check(self, path: Path, state) -> None:
        if not isinstance(state, dict) or not state:
            raise BarberError(f"{path}: holds no tensors by name; give a folder saved with save_pretrained")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, self._torch.Tensor):
                raise BarberError(f"{path}: {name!r} in it is not a tensor; give a folder saved with save_pretrained")


def _import_torch(location: str):
    try:
        import torch
    except ImportError:
        raise BarberError(
            f"{location}: reading its .bin files needs PyTorch: pip install 'barber_jax[torch]'; "
            "or give the checkpoint as safetensors"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH_VERSION:
        raise BarberError(
            f"{location}: PyTorch {torch.__version__} does not read .bin files safely: "
            "pip install -U 'barber_jax[torch]'"
        )
    return torch


def _load_error(path: Path, error: Exception) -> BarberError:
    """The error for a file that PyTorch failed to load."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            return BarberError(
                f"{path}: refused: it contains more than tensors and asks to run {found[1]}; nothing of it was run; "
                "fetch the checkpoint from a source that you trust, preferably as safetensors"
            )
    return _damaged(path, error)


def _damaged(path: Path, error: Exception | str) -> BarberError:
    cause = str(error).strip().split("\n")[0][:200]
    return BarberError(f"{path}: truncated or corrupt PyTorch file ({cause}); fetch it again")
