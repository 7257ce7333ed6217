"""Finds all parts of a GGUF file that was split, NAME-00001-of-00003.gguf and so on, and merges their headers."""

import re
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.convert.gguf_header import Header, read_header


def read_parts(path: Path) -> tuple[Header, dict[str, Path]]:
    """Read the header of a GGUF file and, if it is one part of a split file, of all other parts.

    Args:
        path: the file, or any of the parts, which lie in one folder.

    Returns:
        Metadata of the first part and tensors of all; and tensor name -> the part that holds it, in order of the parts.

    Raises:
        BarberError: a part is missing, damaged, or does not belong to the others.
    """
    header = read_header(path)
    count = header.fields.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header, dict.fromkeys(header.tensors, path)
    fields, tensors, parts = {}, {}, {}
    for index, part in enumerate(_part_paths(path, count)):
        if not part.is_file():
            raise BarberError(f"{part}: part {index + 1} of {count} of a split GGUF file is not there; fetch it too")
        header = read_header(part)
        if header.fields.get("split.count") != count or header.fields.get("split.no") != index:
            raise BarberError(f"{part}: not part {index + 1} of {count} by its header; fetch all parts again")
        fields = fields or header.fields
        if twice := header.tensors.keys() & tensors.keys():
            raise BarberError(f"{part}: tensor {min(twice)} is in another part too; fetch all parts again")
        tensors |= header.tensors
        parts |= dict.fromkeys(header.tensors, part)
    total = fields.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise BarberError(f"{path}: its parts hold {len(tensors)} tensors, not {total}; fetch all parts again")
    return Header(fields, tensors), parts


def _part_paths(path: Path, count: int) -> list[Path]:
    name = re.fullmatch(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", path.name)
    if not name or int(name[2]) != count:
        raise BarberError(
            f"{path}: one of {count} parts of a split GGUF file, but not named NAME-00001-of-{count:05d}.gguf; "
            "rename the parts, or merge them with llama-gguf-split --merge"
        )
    return [path.with_name(f"{name[1]}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
