"""Orbax handler that stores one block of an unfinished run as a safetensors file.

The file's metadata hold the block's record and a checksum over the record and the arrays. Orbax's own array and JSON
handlers take five times as long to write a block and have no such checksum.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import xxhash
from safetensors import SafetensorError, safe_open

from barber_jax.console import documents
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.run.fingerprint import array_fingerprint

NAME = "block.safetensors"
READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError)
"""Errors that reading a damaged file, or an Orbax step without one, can raise."""

Block = tuple[dict[str, np.ndarray], dict]
"""Arrays by name, and the record (JSON-serialisable)."""


class BlockHandler(ocp.CheckpointHandler):
    """Reads and writes the block's file in the folder of an Orbax item."""

    def save(self, directory: os.PathLike, args: "BlockSave") -> None:
        """Write `args.block`. Raises `BarberError` if the file cannot be written."""
        arrays, record = args.block
        content = json.dumps({"names": list(arrays), "record": record})
        metadata = {"content": content, "checksum": _checksum(arrays, content)}
        specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        with SafetensorsWriter(Path(directory) / NAME, specs, metadata) as file:
            for name, array in arrays.items():
                file.write(name, array)

    def restore(self, directory: os.PathLike, args: "BlockRestore") -> Block:
        """Read a block, its arrays in the order in which they were saved. Raises one of `READ_ERRORS` if damaged."""
        with safe_open(Path(directory) / NAME, "np") as file:
            metadata = file.metadata()
            content = documents.parse(metadata["content"])
            arrays = {name: file.get_tensor(name) for name in content["names"]}
        if metadata["checksum"] != _checksum(arrays, metadata["content"]):
            raise ValueError("its checksum does not match")
        return arrays, content["record"]


@ocp.args.register_with_handler(BlockHandler, for_save=True)
@dataclass
class BlockSave(ocp.args.CheckpointArgs):
    """Argument for Orbax to save a block."""

    block: Block


@ocp.args.register_with_handler(BlockHandler, for_restore=True)
@dataclass
class BlockRestore(ocp.args.CheckpointArgs):
    """Argument for Orbax to restore a block."""


def _checksum(arrays: Mapping[str, np.ndarray], content: str) -> str:
    """Hash of the arrays and of the JSON text of their names and the record."""
    digest = xxhash.xxh3_128(content.encode())
    for array in arrays.values():
        digest.update(array_fingerprint(array).encode())
    return digest.hexdigest()
