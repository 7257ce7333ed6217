"""Reads mask files, masks.safetensors, which say which weights a pruned model keeps, in one bit per weight.

One uint8 tensor per pruned matrix, under the weight's Hugging Face name: `numpy.packbits` of the flattened [out, in]
mask, True = kept. The header's metadata hold format, version, pattern, sparsity and the shapes of the matrices.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import FileState, check_fetched, writing
from barber_jax.masks.pattern import SparsityPattern

FILE_NAME = "masks.safetensors"
"""Name of the mask file in the folder of a pruned model."""

FORMAT = "barber_jax.masks"
VERSION = 1


def packed_length(shape: tuple[int, int]) -> int:
    """Length in bytes of a packed [out, in] mask."""
    return -(-math.prod(shape) // 8)


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack a mask into bits: bool [out, in] -> uint8 [ceil(out * in / 8)]. Raises ValueError for other arrays."""
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"a mask is a bool matrix, not {mask.dtype} of shape {mask.shape}")
    return np.packbits(mask.reshape(-1))


def unpack(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Invert `pack`: uint8 [ceil(out * in / 8)] -> bool [out, in]. Raises ValueError if dtype or length is wrong."""
    if packed.dtype != np.uint8 or packed.shape != (packed_length(shape),):
        raise ValueError(f"{packed.dtype} of shape {packed.shape} is not a packed mask of shape {tuple(shape)}")
    return np.unpackbits(packed, count=math.prod(shape)).view(np.bool_).reshape(shape)


def mask_metadata(pattern: str, sparsity: float, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Build the header metadata of a mask file.

    Args:
        pattern: "unstructured" or N:M such as "2:4".
        sparsity: fraction of weights pruned.
        shapes: weight name -> (out, in).
    """
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "pattern": pattern,
        "sparsity": str(float(sparsity)),
        "shapes": json.dumps({name: [int(n) for n in shape] for name, shape in shapes.items()}),
    }


class Masks:
    """A mask file opened for reading; each mask is read when it is requested.

    Attributes:
        path: the file.
        pattern: "unstructured" or N:M such as "2:4".
        sparsity: requested fraction of weights pruned.
        shapes: weight name -> (out, in).
    """

    def __init__(self, path: Path, file: safe_open, state: FileState):
        self.path = path
        self._file, self._state = file, state
        metadata = self._metadata()
        self.pattern = self._parse_pattern(metadata["pattern"])
        self.sparsity = self._parse_sparsity(metadata["sparsity"])
        self.shapes = self._parse_shapes(metadata["shapes"])
        self._check_tensors()

    def names(self) -> list[str]:
        """Hugging Face names of the pruned weights."""
        return list(self.shapes)

    def read(self, name: str) -> np.ndarray:
        """Read one mask, bool [out, in], True = kept. Raises BarberError if the file has no mask of that name."""
        return unpack(self.packed(name), self.shapes[name])

    def packed(self, name: str) -> np.ndarray:
        """Read one packed mask, uint8, as from `pack`. Raises BarberError if the file has no mask of that name.

        Bits of the last byte that belong to no weight are zero, whatever they are in the file.
        """
        if name not in self.shapes:
            raise BarberError(f"{self.path}: no mask for {name}; its first mask is {next(iter(self.shapes), 'none')}")
        try:
            packed = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BarberError(f"{self.path}: cannot read {name}: {error}; write or copy the file again") from error
        padding = -math.prod(self.shapes[name]) % 8
        if packed[-1] & ~(-1 << padding):
            packed = packed.copy()
            packed[-1] &= 256 - (1 << padding)
        return packed

    def copy(self, target: Path) -> None:
        """Copy the file byte for byte. Raises BarberError if it cannot be written, or is no longer the one opened."""
        with writing(target):
            shutil.copyfile(self.path, target)
        self._state.check()

    def _bad(self, what: str) -> BarberError:
        return BarberError(f"{self.path}: {what}; write or copy the mask file again")

    def _metadata(self) -> dict[str, str]:
        metadata = self._file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise BarberError(
                f"{self.path}: not a mask file: its metadata give format {metadata.get('format')!r}, not {FORMAT!r}; "
                "give the masks.safetensors that was written beside the pruned model"
            )
        version = metadata.get("version", "")
        if not re.fullmatch("[0-9]{1,9}", version):
            raise self._bad(f"version {version!r} is not a number")
        if int(version) > VERSION:
            raise BarberError(
                f"{self.path}: mask file version {version} is newer than {VERSION}, the latest known; update barber_jax"
            )
        for key in ("pattern", "sparsity", "shapes"):
            if not metadata.get(key):
                raise self._bad(f"the metadata lack {key!r}")
        return metadata

    def _parse_pattern(self, text: str) -> str:
        try:
            return str(SparsityPattern.parse(text, None))
        except BarberError:
            raise self._bad(f"pattern {text[:50]!r} is neither 'unstructured' nor N:M such as 2:4") from None

    def _parse_sparsity(self, text: str) -> float:
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = math.nan
        if not 0 <= sparsity <= 1:
            raise self._bad(f"sparsity {text!r} is not a number between 0 and 1")
        return sparsity

    def _parse_shapes(self, text: str) -> dict[str, tuple[int, int]]:
        try:
            shapes = documents.parse(text)
        except documents.DocumentError as error:
            raise self._bad("the metadata's shapes are not JSON") from error
        if not isinstance(shapes, dict):
            raise self._bad("the metadata's shapes are not a JSON object")
        for name, shape in shapes.items():
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                raise self._bad(f"the shape of {name} is {shape!r}, not [out, in]")
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

    def _check_tensors(self) -> None:
        tensors = set(self._file.keys())
        if tensors != self.shapes.keys():
            odd = min(tensors ^ self.shapes.keys())
            raise self._bad(f"{odd} has a {'mask but no shape' if odd in tensors else 'shape but no mask'}")
        for name, shape in self.shapes.items():
            tensor = self._file.get_slice(name)
            if tensor.get_dtype() != "U8":
                raise self._bad(f"the mask of {name} has dtype {tensor.get_dtype()}, not U8")
            if tensor.get_shape() != [packed_length(shape)]:
                raise self._bad(
                    f"the mask of {name} has shape {tensor.get_shape()}; "
                    f"{list(shape)} weights pack into [{packed_length(shape)}]"
                )


def read_masks(path: str | os.PathLike) -> Masks:
    """Open a mask file, or that of a folder, and check its header; each mask is read when it is requested.

    Raises:
        BarberError: the file is missing, damaged, not a mask file, or of a newer format version.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise BarberError(f"{path}: no such file; give a masks.safetensors file")
    check_fetched(path)
    try:
        state = FileState(path)
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise BarberError(f"{path}: not a safetensors file, or cut short ({error}); write or copy it again") from error
    except OSError as error:
        raise BarberError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    return Masks(path, file, state)
