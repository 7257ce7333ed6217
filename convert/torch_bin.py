"""PyTorch checkpoints: a folder of pytorch_model.bin, or its shards. PyTorch is imported only here, and only then."""

import pickle
import re
from pathlib import Path

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.convert.folder import FLOATS, ShardedFolder

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SAFE_SINCE = (2, 6)
"""PyTorch before this could be made to run code even where it was asked to load weights only (CVE-2025-32434)."""


class TorchBinFolder(ShardedFolder):
    """A folder with config.json and one or many .bin files that `torch.save` wrote.

    Files are mapped, and only the tensor asked for is read. Files of PyTorch before 1.6 cannot be: of these, one at a
    time is held in memory.
    """

    weights = WEIGHTS
    index = INDEX
    dtypes = {f"torch.{name}": dtype for name, dtype in FLOATS.items()}  # noqa: RUF012

    def __init__(self, folder: Path, location: str | None = None):
        """Open `folder`.

        Raises:
            BarberError: PyTorch is missing or too old, or a file is damaged or holds more than tensors.
        """
        self._torch = _import_torch(location or str(folder))
        self._unmapped: tuple[Path | None, dict] = (None, {})
        super().__init__(folder, location)

    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._load(self.folder / file).items()
        }

    def _fetch(self, path: Path, name: str) -> np.ndarray:
        # Loaded anew for each tensor: a file that stays mapped would let resident memory grow to the checkpoint's size.
        tensor = self._load(path).get(name)
        if tensor is None:
            raise _damaged(path, f"tensor {name} is gone")
        try:
            bits = tensor.detach().contiguous()
            if tensor.dtype == self._torch.bfloat16:
                # NumPy has no bfloat16 for PyTorch to give; the bits are the same.
                return bits.view(self._torch.int16).numpy().view(FLOATS["bfloat16"]).copy()
            return bits.numpy().copy()
        except (RuntimeError, TypeError) as error:
            raise _damaged(path, error) from None

    def _exported(self, file: str) -> str:
        return f"{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"

    def _load(self, path: Path) -> dict:
        """Every tensor of a file by name."""
        held, state = self._unmapped
        if held == path:
            return state
        try:
            with open(path, "rb") as handle:
                mapped = handle.read(4) == b"PK\x03\x04"
            state = self._torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            # A damaged file raises whatever the pickle's or the archive's reader stumbles over.
            raise _refusal(path, error) from None
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
    if version < SAFE_SINCE:
        raise BarberError(
            f"{location}: PyTorch {torch.__version__} does not read .bin files safely: "
            "pip install -U 'barber_jax[torch]'"
        )
    return torch


def _refusal(path: Path, error: Exception) -> BarberError:
    """What to say of a file that PyTorch did not load."""
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            return BarberError(
                f"{path}: refused: it holds more than tensors, it asks to run {asked[1]}; nothing of it was run; "
                "fetch the checkpoint from a place that you trust, best as safetensors"
            )
    return _damaged(path, error)


def _damaged(path: Path, error: Exception | str) -> BarberError:
    cause = str(error).strip().split("\n")[0][:200]
    return BarberError(f"{path}: truncated or corrupt PyTorch file ({cause}); fetch it again")
