"""Formats that a finished checkpoint folder can have."""

from pathlib import Path
from typing import Literal

from barber_jax.console.files import writing
from barber_jax.convert.export import MASKS
from barber_jax.convert.hf_folder import INDEX, HFFolder
from barber_jax.masks.mask_file import read_masks

Format = Literal["hf", "orbax", "both"]
"""hf: safetensors as Hugging Face has them. orbax: the Flax parameter tree and the masks. both: side by side."""


def apply_format(folder: Path, format: Format) -> None:
    """Give a finished Hugging Face folder another format, in place; masks.safetensors and run.json stay.

    Until the safetensors are dropped, both formats take room on the disk.

    Raises:
        BarberError: the disk refuses.
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
