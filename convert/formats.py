"""Converts a finished checkpoint folder to the requested output format."""

from pathlib import Path
from typing import Literal

from barber_jax.console.files import writing
from barber_jax.convert.export import MASKS
from barber_jax.convert.hf_folder import INDEX, HFFolder
from barber_jax.masks.mask_file import read_masks

Format = Literal["hf", "orbax", "both"]
"""hf: Hugging Face safetensors. orbax: the Flax parameter tree and the masks. both: side by side."""


def apply_format(folder: Path, format: Format) -> None:
    """Convert a finished Hugging Face folder to another format in place; masks.safetensors and run.json stay.

    Both formats take disk space until the safetensors files are deleted.

    Raises:
        BarberError: the folder cannot be written.
    """
    if format == "hf":
        return
    from barber_jax.convert.orbax_folder import write_orbax

    source, masks = HFFolder(folder), folder / MASKS
    write_orbax(folder, source, read_masks(masks) if masks.exists() else None)
    if format == "orbax":
        with writing(folder):
            for file in {*source.files.values(), INDEX}:
                (folder / file).unlink(missing_ok=True)
