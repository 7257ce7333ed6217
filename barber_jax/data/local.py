"""Reads the documents of local text files and folders one after another, never a whole file at once."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched, expand
from barber_jax.data import columns, lines

FILE_TYPES = ".txt, .jsonl, .json (also .gz), .parquet, .arrow, a folder of such shards or of datasets.save_to_disk"
REMEDIES = {
    ".csv": "write it as .parquet: pandas.read_csv(file).to_parquet(...)",
    ".tsv": "write it as .parquet: pandas.read_csv(file, sep='\\t').to_parquet(...)",
    ".md": "copy it to a .txt, which is read as plain text",
    ".ndjson": "rename it to .jsonl",
    ".jsonlines": "rename it to .jsonl",
    ".gz": "decompress it",
    ".zst": "decompress it",
    ".zip": "unpack it",
    ".xz": "decompress it",
    ".bz2": "decompress it",
}
"""Suffix that is not read -> what to do."""

LINES = (".txt", ".jsonl", ".json")
COLUMNS = (".parquet", ".arrow")

Document = str | Iterable[str] | None
"""A document: its text, as a whole or in consecutive blocks. None for a row without text."""


def iterate_documents(path: Path, text_field: str = "text", longest: int | None = None) -> Iterator[str | None]:
    """Yield the documents of a local file or folder in order, including duplicates and empty ones.

    At any time one document, and a block of the file, is in memory. A row without text (null) is yielded as None.

    Args:
        path: .txt (the whole file is one document, with newlines read as LF, as by Python's open()), .jsonl or .json
            (one object per line; .json may also be one array of objects), each of these also with .gz; .parquet;
            .arrow (stream or file format); a folder of .parquet, .arrow, .jsonl or .json files, which are read in the
            order of their names, only those of the split `train` where names tell splits apart; or a folder written by
            `datasets.save_to_disk`, of which the split `train`, or the only split, is read. A byte order mark is
            skipped.
        text_field: name of the text field; .txt has none.
        longest: cut longer documents into pieces of at most so many characters, at white space where there is some.

    Raises:
        BarberError: `path` does not exist, has an unknown suffix, or is empty or damaged; the text is not UTF-8; the
            field is missing or not text; or there are several splits without `train`.
    """
    for document in documents_of(path, text_field):
        if document is None:
            yield None
        elif longest is None:
            yield "".join(document)
        else:
            yield from pieces(document, longest)


def documents_of(path: Path, text_field: str) -> Iterator[Document]:
    """`iterate_documents`, but a long document may be given in consecutive blocks instead of pieces."""
    path = expand(path)
    if not path.exists():
        raise BarberError(f"{path}: no such file or folder; give {FILE_TYPES}")
    return _folder_documents(path, text_field) if path.is_dir() else _file_documents(path, text_field)


def pieces(document: str | Iterable[str], longest: int) -> Iterator[str]:
    """A document, whole or in blocks, in pieces of at most `longest` characters; an empty one as one empty piece."""
    held, yielded = "", False
    for block in [document] if isinstance(document, str) else document:
        held, start = held + block, 0
        while len(held) - start > longest:
            end = _cut(held, start, start + longest)
            yield held[start:end]
            start, yielded = end, True
        held = held[start:]
    if held or not yielded:
        yield held


def _cut(text: str, start: int, end: int) -> int:
    """Where to end a piece that begins at `start`: behind the last line or word of its second half, else at `end`."""
    for mark in ("\n", " "):
        found = text.rfind(mark, (start + end) // 2, end)
        if found >= 0:
            return found + 1
    return end


def _file_documents(path: Path, field: str) -> Iterator[Document]:
    kind = _kind(path)
    if kind is None:
        remedy = REMEDIES.get(path.suffix.lower(), "copy it to a .txt if it is plain text")
        raise BarberError(f"{path}: unknown suffix {path.suffix!r}; give {FILE_TYPES}: {remedy}")
    if path.stat().st_size == 0:
        raise BarberError(f"{path}: the file is empty; give one with text")
    check_fetched(path)
    if kind == ".txt":
        yield lines.txt_blocks(path)
    elif kind in (".jsonl", ".json"):
        yield from lines.json_values(path, kind, field)
    else:
        batches = columns.parquet_batches if kind == ".parquet" else columns.arrow_batches
        yield from columns.column_values(path, batches, field)


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, in lower case and without .gz; None for an unknown one."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in LINES else None
    return suffix if suffix in (*LINES, *COLUMNS) else None


def _folder_documents(path: Path, field: str) -> Iterator[Document]:
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        yield from columns.column_values(path, columns.saved_batches, field)
        return
    for shard in _shards(path):
        yield from _file_documents(shard, field)


def _shards(folder: Path) -> list[Path]:
    """The files of a folder that hold its documents, in the order of their names."""
    # Not the descriptions that lie beside them, dataset_info.json among them.
    named = [file for file in sorted(folder.iterdir()) if not file.name.startswith((".", "_", "dataset_info"))]
    shards = [file for file in named if file.is_file() and _kind(file) not in (None, ".txt")]
    if not shards:
        inside = (file for file in folder.glob("[!.]*/[!.]*") if file.is_file() and _kind(file))
        if inner := min((file.parent for file in inside), default=None):
            raise BarberError(f"{folder}: its files are in folders; give one of these, such as {inner}")
        raise BarberError(
            f"{folder}: not a folder of datasets.save_to_disk, nor one of .parquet, .arrow or .jsonl files; "
            f"give {FILE_TYPES}"
        )
    kinds = sorted({_kind(file) for file in shards})
    if len(kinds) > 1:
        raise BarberError(f"{folder}: holds {' and '.join(kinds)} files; give one of them, or a folder of one kind")
    train, others = [
        [file for file in shards if re.search(rf"(?<![a-z])({words})(?![a-z])", file.name.lower())]
        for words in ("train|training", "test|valid|validation|val|dev|eval")
    ]
    if others and not train:
        raise BarberError(f"{folder}: no split 'train' (there is {others[0].name}); give one of its files")
    return train if others else shards
