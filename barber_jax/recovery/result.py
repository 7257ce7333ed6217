"""Writes what a recovery gives: the trained parameters in the checkpoint's dtypes, and the masks unchanged."""

import math

import numpy as np

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.export import MASKS, FolderWriter
from barber_jax.convert.parameters import to_hf
from barber_jax.convert.tied_head import copies
from barber_jax.devices.mesh import Devices
from barber_jax.forward.passes import Parameters
from barber_jax.models.family import Model
from barber_jax.recovery.program import BLOCKS, EMBED
from barber_jax.recovery.source import MaskSource


def write_result(
    checkpoint: Checkpoint,
    model: Model,
    masks: MaskSource,
    devices: Devices,
    writer: FolderWriter | None,
    values: Parameters,
) -> list[dict]:
    """Write the trained parameters, everything else as it was, and the masks.

    Args:
        checkpoint: the pruned checkpoint.
        writer: of the output folder; None on processes other than the primary one, which take part in the transfer.
        values: name -> trained parameter, [N, ...] for the blocks', float32; all prunable kernels are among them.

    Returns:
        For every block `block` and `weights`: Flax path of a matrix -> norm of its change over its norm before.

    Raises:
        BarberError: a value does not fit the checkpoint's dtype, or the folder cannot be written.
    """
    written: set[str] = set()
    movement: list[dict] = [{"block": index, "weights": {}} for index in range(model.layers)]
    pruned = set(model.pruned_names())
    for name, value in values.items():
        path = name.partition(".")[2]
        if name.startswith(BLOCKS):
            for index in range(model.layers):
                tensor = model.names.of_block(index)[path]
                # One block's at a time: the host never holds a whole stack.
                moved = _write(checkpoint, masks, writer, tensor, path, devices.fetch(value[index]), tensor in pruned)
                if moved is not None and tensor in pruned:
                    movement[index]["weights"][path.removesuffix(".kernel")] = moved
                written.add(tensor)
        else:
            table = model.names.embed if name.startswith(EMBED) else model.names.head
            value = devices.fetch(value)
            for tensor in (table[path], *copies(checkpoint, model, table[path])):
                _write(checkpoint, masks, writer, tensor, path, value, False)
                written.add(tensor)
    if writer:
        writer.finish(written)
        if masks.file:
            # Byte for byte, whoever wrote it.
            masks.file.copy(writer.folder / MASKS)
    return movement


def _write(
    checkpoint: Checkpoint,
    masks: MaskSource,
    writer: FolderWriter | None,
    name: str,
    path: str,
    value: np.ndarray,
    is_pruned: bool,
) -> float | None:
    """Write one tensor and return how far it moved, relative to its norm; None where nothing is written."""
    if writer is None:
        return None
    before = checkpoint.read(name)
    with np.errstate(over="ignore"):
        tensor = to_hf(path, value).astype(before.dtype)
    mask = masks.read(name) if is_pruned else None
    if mask is not None:
        before = np.where(mask, before, np.zeros((), before.dtype))
        writer.write_pruned(name, tensor, mask)
    else:
        writer.write(name, tensor)
    change, size = (
        float(np.linalg.norm(each.astype(np.float64)))
        for each in (tensor.astype(np.float32) - before.astype(np.float32), before.astype(np.float32))
    )
    return change / size if size else math.inf if change else 0.0
