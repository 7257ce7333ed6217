"""Reads .txt and JSON files, also gzipped, a block or a line at a time."""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.data.columns import no_field, short

_BLOCK = 1 << 20
_LONGEST = documents.MAX_BYTES
"""Bytes of one line of JSON, or of a .json that is one array: these are held in memory as a whole."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed; errors while it is read become a BarberError that names it."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as handle:
            yield handle
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BarberError(f"{path}: damaged or not gzip ({short(error)}); fetch it again") from error
    except OSError as error:
        raise BarberError(f"{path}: cannot be read ({short(error)})") from error


def _not_utf8(path: Path, position: int) -> BarberError:
    return BarberError(f"{path}: not UTF-8 at byte {position}; save the file as UTF-8")


def txt_blocks(path: Path) -> Iterator[str]:
    """The content of a .txt in consecutive blocks, with newlines as LF and without a byte order mark."""
    # Universal newlines, as wikitext is usually read: CRLF would give different tokens.
    decoder, newlines = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
    position, begun, block = 0, False, None
    with _opened(path) as handle:
        while block != b"":
            block = handle.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, position - pending + error.start) from error
            position += len(block)
            yield newlines.decode(text if begun else text.removeprefix("\ufeff"), final=not block)
            begun = begun or bool(text)


def json_values(path: Path, kind: str, field: str) -> Iterator[str | None]:
    """The text of each record of a .jsonl or .json; None where it is null."""
    # Not read with `datasets`: its type inference converts text that looks like a date or is mixed with numbers.
    start, seen = 0, False
    with _opened(path) as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(_LONGEST + 1), b""), start=1):
            if len(raw) > _LONGEST:
                raise BarberError(f"{path}: line {number} is longer than 64 MiB; write one object per line")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start + error.start) from error
            start += len(raw)
            line = line.removeprefix("\ufeff") if number == 1 else line
            if not line.strip():
                continue
            if kind == ".json" and not seen and line.lstrip().startswith("["):
                yield from _array_values(path, line, handle, field)
                return
            seen = True
            yield _text_of(f"{path}: line {number}", _parsed(f"{path}: line {number}", line), field)


def _array_values(path: Path, line: str, handle: BinaryIO, field: str) -> Iterator[str | None]:
    """The values of a file that is one array of objects, of which `line` has been read."""
    rest = handle.read(_LONGEST)
    if len(rest) == _LONGEST:
        raise BarberError(f"{path}: an array longer than 64 MiB; write one object per line (jq -c '.[]')")
    try:
        rows = _parsed(f"{path}: the array in it", line + rest.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, len(line.encode()) + error.start) from error
    for row, record in enumerate(rows):
        yield _text_of(f"{path}: row {row}", record, field)


def _parsed(where: str, line: str):
    try:
        return documents.parse(line)
    except documents.DocumentError as error:
        raise BarberError(f"{where} is not JSON ({short(error)}); write one object per line") from error


def _text_of(where: str, record, field: str) -> str | None:
    """The text of a JSON record; `where` begins the error message."""
    if not isinstance(record, dict):
        raise BarberError(f"{where} is not a JSON object; write one object per line")
    if field not in record:
        raise no_field(where, field, record)
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise BarberError(f"{where}: field {field!r} is not text; name another with --text-field")
    if value and not documents.is_unicode(value):
        raise BarberError(f"{where}: field {field!r} holds half of a surrogate pair; fix or remove the line")
    return value
