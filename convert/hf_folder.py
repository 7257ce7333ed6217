"""Reads Hugging Face checkpoint folders with safetensors files."""

from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched
from barber_jax.convert.folder import FLOATS, ShardedFolder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HFFolder(ShardedFolder):
    """A folder with config.json and one or more safetensors files."""

    weights = WEIGHTS
    index = INDEX
    dtypes: ClassVar = {"F32": FLOATS["float32"], "F16": FLOATS["float16"], "BF16": FLOATS["bfloat16"]}

    def _open(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        path = self.folder / file
        check_fetched(path)
        try:
            with safe_open(path, "np") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
                return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def _fetch(self, path: Path, name: str) -> np.ndarray:
        # Reopened for each tensor: while a file stays mapped, resident memory can grow to the checkpoint's size.
        try:
            with safe_open(path, "np") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BarberError:
    return BarberError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again")
