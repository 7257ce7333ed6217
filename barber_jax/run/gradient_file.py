"""Statistics of the dense model's gradients on disk: written last block first by the backward sweep, read first block
first.

One safetensors file holds the arrays of all blocks, and for each a checksum. It gets its name when it is complete.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from barber_jax.console.errors import BarberError
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.run.block_file import READ_ERRORS
from barber_jax.run.fingerprint import array_fingerprint
from barber_jax.run.identity import first_line

WEIGHTS, TOKENS = "gradients.safetensors", "token_weights.safetensors"
"""Files in the folder of an unfinished run: norms of weight gradients, and weights of tokens."""
CHECKSUMS = "checksums"
"""Tensor uint8 [arrays, 16]: the hash of every array, block by block in the order of a block's names."""


class GradientFile:
    """A file with float32 arrays for every block of a model.

    Args:
        path: of the file, which need not exist.
        layers: number of blocks.
        shapes: name -> shape of each array of a block.
    """

    def __init__(self, path: Path, layers: int, shapes: Mapping[str, tuple[int, ...]]):
        self.path, self._layers, self._shapes = path, layers, dict(shapes)
        self._order = [f"{index}/{name}" for index in range(layers) for name in self._shapes]

    def write(self, blocks: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> None:
        """Write the arrays of all blocks, given in any order with the block's index, one block in memory at a time.

        Raises:
            BarberError: the file cannot be written; nothing of it is left.
        """
        float32, digests = np.dtype(np.float32), {}
        specs = {f"{index}/{name}": (float32, s) for index in range(self._layers) for name, s in self._shapes.items()}
        specs[CHECKSUMS] = (np.dtype(np.uint8), (len(self._order), 16))
        with SafetensorsWriter(self.path, specs) as file:
            for index, block in blocks:
                for name in self._shapes:
                    array = np.ascontiguousarray(block[name])
                    file.write(f"{index}/{name}", array)
                    digests[f"{index}/{name}"] = bytes.fromhex(array_fingerprint(array))
            content = b"".join(digests[name] for name in self._order)
            file.write(CHECKSUMS, np.frombuffer(content, np.uint8).reshape(-1, 16))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Read the arrays of a block, by name.

        Raises:
            BarberError: the file is missing or damaged.
        """
        try:
            return self._read(index)
        except READ_ERRORS as error:
            raise BarberError(f"{self.path}: damaged ({first_line(error)}); --resume computes it again") from error

    def _read(self, index: int) -> dict[str, np.ndarray]:
        with safe_open(self.path, "np") as file:
            checksums = file.get_tensor(CHECKSUMS)
            found = {name: file.get_tensor(f"{index}/{name}") for name in self._shapes}
        for name, array in found.items():
            # The hash is of dtype and shape too.
            checksum = checksums[self._order.index(f"{index}/{name}")].tobytes()
            if array.shape != self._shapes[name] or bytes.fromhex(array_fingerprint(array)) != checksum:
                raise ValueError(f"the checksum of {index}/{name} does not match")
        return found

    def is_whole(self) -> bool:
        """Whether the arrays of all blocks are there and undamaged."""
        try:
            for index in range(self._layers):
                self._read(index)
        except (*READ_ERRORS, IndexError):
            return False
        return True
