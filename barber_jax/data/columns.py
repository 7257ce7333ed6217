"""Reads the text column of .parquet and .arrow files and of saved datasets, a batch of rows at a time."""

import contextlib
import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched

if TYPE_CHECKING:
    import pyarrow

_BUFFER = 1 << 20


def parquet_batches(path: Path, field: str) -> Iterator["pyarrow.RecordBatch"]:
    """The text column of a .parquet."""
    from pyarrow import parquet

    # Buffered: otherwise the whole column of a row group, which may be the file's only one, is read at once.
    with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise no_field(path, field, names)
        yield from file.iter_batches(batch_size=1000, columns=[field])


def arrow_batches(path: Path, field: str) -> Iterator["pyarrow.Table"]:
    """The rows of an .arrow, of the stream or the file format."""
    from datasets import load_dataset

    # Streaming makes no copy in the cache, so an edited file is never read from a stale copy. data_files are glob
    # patterns, so brackets in a name must be escaped.
    files = {"data_files": glob.escape(str(path)), "split": "train", "streaming": True}
    yield from load_dataset("arrow", **files).with_format("arrow").iter(batch_size=1000)


def saved_batches(path: Path, field: str) -> Iterator["pyarrow.Table"]:
    """The rows of a folder written by `datasets.save_to_disk`, of the split `train` or the only one."""
    from datasets import DatasetDict, load_from_disk

    for file in path.rglob("*.arrow"):
        check_fetched(file)
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        split = next(iter(dataset)) if len(dataset) == 1 else "train"
        if split not in dataset:
            splits = ", ".join(dataset) or "none"
            raise BarberError(f"{path}: no split 'train' (splits: {splits}); give the folder of one split")
        dataset = dataset[split]
    yield from dataset.with_format("arrow").iter(batch_size=1000)


def column_values(
    path: Path, batches: Callable[[Path, str], Iterable["pyarrow.Table"]], field: str
) -> Iterator[str | None]:
    """Yield the text field row by row; exceptions of `datasets` and Arrow become a BarberError that names the file."""
    row = 0
    try:
        with _quiet_datasets():
            for batch in batches(path, field):
                names = batch.schema.names
                if field not in names:
                    raise no_field(path, field, names)
                for value in batch.column(field).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise BarberError(
                            f"{path}: field {field!r} of row {row} is not text; name another with --text-field"
                        )
                    yield value
                    row += 1
    except BarberError:
        raise
    except UnicodeDecodeError as error:
        raise BarberError(f"{path}: field {field!r} is not UTF-8; write the file again as UTF-8") from error
    except Exception as error:
        raise BarberError(f"{path}: damaged or of another format ({short(error)}); write it again") from error


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the log lines that `datasets` prints when it raises an exception."""
    from datasets.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def no_field(where: Path | str, field: str, fields: Iterable[str]) -> BarberError:
    """The error for a field that is not among `fields`; `where` begins the message."""
    known = ", ".join(fields)
    return BarberError(f"{where}: no field {field!r} (fields: {known}); name one of them with --text-field")


def short(error: BaseException) -> str:
    """First line of an exception's message, or else its type, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
