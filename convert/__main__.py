"""python -m barber_jax.convert: convert a checkpoint to another format, without pruning it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from barber_jax import __version__
from barber_jax.console.command import parse
from barber_jax.console.documents import read_json
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import MASKS, RECOVERED, RUN, FolderWriter, claimed
from barber_jax.convert.flax_module import check_zeros, open_masks
from barber_jax.convert.folder import ModelFolder
from barber_jax.convert.formats import Format, apply_format
from barber_jax.convert.parameters import check_tensors
from barber_jax.models import build_model


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint to another format. A mask file in its folder is copied along."""

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
            # An empty path would mean the current folder.
            raise BarberError("--ckpt is empty; name the checkpoint to read")


def convert(config: ConvertConfig) -> None:
    """Convert a checkpoint; every tensor keeps its values and dtype.

    run.json and recover.json are copied from the source, each with a note of the conversion added. A source that has
    neither gets a run.json with nothing but the note.

    Raises:
        BarberError: the source cannot be read, its mask file is not that of its weights, or --out cannot be written;
            nothing is left under --out then.
    """
    with claimed(config.out, config.overwrite, [Path(config.ckpt)]):
        _convert(config)


def _convert(config: ConvertConfig) -> None:
    """Do what `convert` does, with --out claimed."""
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    check_tensors(checkpoint, model)
    masks, records = open_masks(checkpoint, model), _load_records(checkpoint)
    with FolderWriter(config.out, checkpoint) as writer:
        if writer.no_tokenizer:
            print(writer.no_tokenizer, file=sys.stderr)
        pruned = masks.names() if masks else []
        for name in pruned:
            tensor = checkpoint.read(name)
            check_zeros(checkpoint, name, tensor, masks.read(name))
            writer.write(name, tensor)
        writer.finish(set(pruned))
        if masks:
            masks.copy(writer.folder / MASKS)
        apply_format(writer.folder, config.format)
        note = {"ckpt": config.ckpt, "format": config.format, "barber_jax": __version__}
        for name, record in (records or {RUN: {}}).items():
            writer.write_json(name, {**record, "converted": note})
        writer.publish()


def _load_records(checkpoint: Checkpoint) -> dict[str, dict]:
    """Name -> content of the run.json and recover.json of a checkpoint's folder."""
    if not isinstance(checkpoint, ModelFolder):
        return {}
    records = (checkpoint.folder / name for name in (RUN, RECOVERED))
    return {path.name: read_json(path, f"{path}: missing") for path in records if path.exists()}


def run(arguments: list[str] | None = None) -> None:
    """Run the command line (None: sys.argv)."""
    convert(parse(ConvertConfig, "barber_jax.convert", arguments))


if __name__ == "__main__":
    exit_with_one_line(run)
