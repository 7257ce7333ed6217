"""One block of an unfinished run as an item of an Orbax checkpoint: a safetensors file.

Its metadata carry the block's record, and a checksum over that and the arrays. Orbax's own handlers of arrays and JSON
take five times as long to write a block, and have no such checksum.
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

from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.run.fingerprint import array_fingerprint

NAME = "block.safetensors"
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
"""What reading a damaged file, or an Orbax step without one, can raise."""

Block = tuple[dict[str, np.ndarray], dict]
"""Arrays by name, and the record (JSON)."""


class BlockHandler(ocp.CheckpointHandler):
    """Reads and writes the file in the folder that Orbax gives it."""

    def save(self, directory: os.PathLike, args: "BlockSave") -> None:
        """Write `args.block`. Raises BarberError if the disk refuses."""
        arrays, record = args.block
        content = json.dumps({"names": list(arrays), "record": record})
        metadata = {"content": content, "checksum": _checksum(arrays, content)}
        specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        with SafetensorsWriter(Path(directory) / NAME, specs, metadata) as file:
            for name, array in arrays.items():
                file.write(name, array)

    def restore(self, directory: os.PathLike, args: "BlockRestore") -> Block:
        """The block, in the order in which it was given. Raises one of `DAMAGE` if that is not what is there."""
        with safe_open(Path(directory) / NAME, "np") as file:
            metadata = file.metadata()
            content = json.loads(metadata["content"])
            arrays = {name: file.get_tensor(name) for name in content["names"]}
        if metadata["checksum"] != _checksum(arrays, metadata["content"]):
            raise ValueError("its checksum does not fit")
        return arrays, content["record"]


@ocp.args.register_with_handler(BlockHandler, for_save=True)
@dataclass
class BlockSave(ocp.args.CheckpointArgs):
    """What Orbax is to save."""

    block: Block


@ocp.args.register_with_handler(BlockHandler, for_restore=True)
@dataclass
class BlockRestore(ocp.args.CheckpointArgs):
    """Asks Orbax for a `Block`."""


def _checksum(arrays: Mapping[str, np.ndarray], content: str) -> str:
    digest = xxhash.xxh3_128(content.encode())
    for array in arrays.values():
        digest.update(array_fingerprint(array).encode())
    return digest.hexdigest()
