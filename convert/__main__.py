"""python -m barber_jax.convert: a checkpoint in another format, nothing pruned."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from barber_jax import __version__
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import MASKS, RUN, FolderWriter, check_destination
from barber_jax.convert.folder import ModelFolder, read_json
from barber_jax.convert.formats import Format, apply_format
from barber_jax.convert.parameters import check_tensors
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model


@dataclass(frozen=True)
class ConvertConfig:
    """Write a checkpoint in another format. Masks that lie beside it go along."""

    ckpt: str
    """Checkpoint to convert: a folder (safetensors, PyTorch .bin or Orbax), a Hub id, or a .gguf file."""
    out: Path
    """Folder to write."""
    format: Format = "hf"
    """hf (safetensors), orbax (Flax parameter tree and masks), or both."""
    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self):
        if not self.ckpt:
            # As a path it would mean the current folder.
            raise BarberError("--ckpt is empty; name what to read")


def convert(config: ConvertConfig) -> None:
    """Convert a checkpoint.

    Every tensor keeps its bits and dtype; run.json is the source's, with a note of the conversion.

    Raises:
        BarberError: a mistake of the user's; nothing is left under --out then.
    """
    check_destination(config.out, config.overwrite, [Path(config.ckpt)])
    checkpoint = open_checkpoint(config.ckpt)
    check_tensors(checkpoint, build_model(checkpoint.config, jnp.dtype("float32")))
    with FolderWriter(config.out, checkpoint) as writer:
        writer.finish(set())
        record = _carry(checkpoint, writer.folder)
        apply_format(writer.folder, config.format)
        note = {"ckpt": config.ckpt, "format": config.format, "barber_jax": __version__}
        writer.write_json(RUN, {**record, "converted": note})
        writer.publish()


def _carry(checkpoint: Checkpoint, folder: Path) -> dict:
    """Copy the masks that lie beside a checkpoint; returns the content of its run.json, if it has one."""
    if not isinstance(checkpoint, ModelFolder):
        return {}
    masks, record = checkpoint.folder / MASKS, checkpoint.folder / RUN
    if masks.exists():
        # A damaged file is refused, not copied.
        path = read_masks(masks).path
        with writing(folder / MASKS):
            shutil.copyfile(path, folder / MASKS)
    return read_json(record, f"{record}: missing") if record.exists() else {}


def run(arguments: list[str] | None = None) -> None:
    """The command line."""
    convert(parse(ConvertConfig, "barber_jax.convert", arguments))


if __name__ == "__main__":
    exit_with_one_line(run)
