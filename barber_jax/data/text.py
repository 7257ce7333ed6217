"""Reads and tokenizes text from local files and Hub datasets, for calibration and perplexity evaluation."""

import contextlib
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.data import hub

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

# File suffix -> name of the `datasets` builder that reads it.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
FILE_TYPES = ".txt, .jsonl, .parquet, .arrow or a folder of datasets.save_to_disk"


@dataclass(frozen=True)
class HubDataset:
    """Location of a dataset of the pruning literature on the Hub.

    Attributes:
        repo: dataset repository.
        files: split -> the file of the repository that is read for it.
        builder: name of the `datasets` builder that reads the file.
        field: name of the text field.
        revision: branch of the repository.
    """

    repo: str
    files: dict[str, str]
    builder: str
    field: str
    revision: str = "main"


HUB_DATASETS = {
    "c4": HubDataset(
        repo="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        builder="json",
        field="text",
    ),
    "wikitext2": HubDataset(
        repo="Salesforce/wikitext",
        files={split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
        builder="parquet",
        field="text",
    ),
    # The main branch holds only a loading script, which `datasets` no longer runs.
    "ptb": HubDataset(
        repo="ptb-text-only/ptb_text_only",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")},
        builder="parquet",
        field="sentence",
        revision="refs/convert/parquet",
    ),
}


def read_documents(path: Path, text_field: str = "text") -> list[str]:
    """Read all documents of a local file or folder in order, including duplicates and empty ones.

    Args:
        path: .txt (the whole file is one document, with newlines read as LF, as by Python's open()), .jsonl (one
            object per line), .parquet, .arrow (stream or file format), or a folder written by `datasets.save_to_disk`,
            of which the split `train`, or the only split, is read.
        text_field: name of the text field; .txt has none.

    Raises:
        BarberError: `path` does not exist, has an unknown suffix, or is empty or damaged; the text is not UTF-8; the
            field is missing or not text; or there are several splits without `train`.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise BarberError(f"{path}: no such file or folder; give {FILE_TYPES}")
    if path.is_dir():
        documents = list(_field_values(path, _folder_batches(path), text_field))
    elif path.suffix not in (".txt", ".jsonl", *_BUILDERS):
        raise BarberError(f"{path}: unknown suffix {path.suffix!r}; give {FILE_TYPES}")
    elif path.stat().st_size == 0:
        raise BarberError(f"{path}: the file is empty; give one with text")
    elif path.suffix == ".txt":
        # Universal newlines, as wikitext is usually read: CRLF would give different tokens.
        documents = [_read_utf8(path).replace("\r\n", "\n").replace("\r", "\n")]
    elif path.suffix == ".jsonl":
        documents = list(_jsonl_values(path, text_field))
    else:
        documents = list(_field_values(path, _file_batches(path), text_field))
    if not documents:
        raise BarberError(f"{path}: holds no rows; give one with text")
    return documents


def hub_documents(name: str, split: str) -> Sequence[str]:
    """Load the documents of one split of a Hub dataset, downloaded once into the Hugging Face cache.

    The result is memory-mapped, so that indexing a few documents of a C4 shard does not read all of it.

    Args:
        name: c4 (first shard of the split; train, validation), wikitext2 (raw; train, test) or ptb (train, test).
        split: one of the dataset's splits.

    Raises:
        BarberError: no such dataset or split, or it is not in the cache and cannot be downloaded.
    """
    if name not in HUB_DATASETS:
        raise BarberError(f"{name}: unknown dataset; known are {', '.join(HUB_DATASETS)}")
    dataset = HUB_DATASETS[name]
    if split not in dataset.files:
        raise BarberError(f"{name}: no split {split!r}; it has {', '.join(dataset.files)}")
    try:
        return _load(dataset.builder, _hub_file(dataset, split), streaming=False)[dataset.field]
    except Exception as error:
        raise BarberError(
            f"{name}: cannot get {dataset.repo} from the Hub ({_short(error)}); "
            f"connect, or give a local file instead ({FILE_TYPES})"
        ) from error


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> np.ndarray:
    """Tokenize a whole text into int32 [tokens], without truncation, with the special tokens the tokenizer adds."""
    # verbose=False: no warning about texts longer than the model's context, since they are cut into windows later.
    ids = tokenizer(text, truncation=False, padding=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BarberError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise BarberError(f"{path}: cannot be read ({_short(error)})") from error


def _jsonl_values(path: Path, field: str) -> Iterator[str]:
    # Not read with `datasets`: its type inference converts text that looks like a date or is mixed with numbers.
    for number, line in enumerate(_read_utf8(path).removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BarberError(f"{where} is not JSON ({_short(error)}); write one object per line") from error
        if not isinstance(record, dict):
            raise BarberError(f"{where} is not a JSON object; write one object per line")
        if field not in record:
            raise _no_field(where, field, record)
        value = record[field]
        if not isinstance(value, str):
            raise BarberError(f"{where}: field {field!r} is not text; name another with --text-field")
        if not _is_unicode(value):
            raise BarberError(f"{where}: field {field!r} holds half of a surrogate pair; fix or remove the line")
        yield value


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_field(where: Path | str, field: str, fields: Iterable[str]) -> BarberError:
    known = ", ".join(fields)
    return BarberError(f"{where}: no field {field!r} (fields: {known}); name one of them with --text-field")


def _file_batches(path: Path) -> Iterator["pyarrow.Table"]:
    # Streaming makes no copy in the cache, so an edited file is never read from a stale copy.
    yield from _load(_BUILDERS[path.suffix], path, streaming=True).with_format("arrow").iter(batch_size=1000)


def _folder_batches(path: Path) -> Iterator["pyarrow.Table"]:
    from datasets import DatasetDict, load_from_disk

    if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        raise BarberError(f"{path}: not a folder of datasets.save_to_disk; give {FILE_TYPES}")
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        split = next(iter(dataset)) if len(dataset) == 1 else "train"
        if split not in dataset:
            splits = ", ".join(dataset) or "none"
            raise BarberError(f"{path}: no split 'train' (splits: {splits}); give the folder of one split")
        dataset = dataset[split]
    yield from dataset.with_format("arrow").iter(batch_size=1000)


def _load(builder: str, path: str | Path, *, streaming: bool):
    from datasets import load_dataset

    # data_files are glob patterns, so brackets in a name must be escaped.
    return load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=streaming)


def _field_values(path: Path, batches: Iterable["pyarrow.Table"], field: str) -> Iterator[str]:
    """Yield the text field row by row; exceptions of `datasets` and Arrow become a BarberError that names the file."""
    row = 0
    try:
        with _quiet_datasets():
            for batch in batches:
                if field not in batch.column_names:
                    raise _no_field(path, field, batch.column_names)
                for value in batch.column(field).to_pylist():
                    if not isinstance(value, str):
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
        raise BarberError(f"{path}: damaged or of another format ({_short(error)}); write it again") from error


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


def _hub_file(dataset: HubDataset, split: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(local_files_only: bool) -> str:
        return hf_hub_download(
            dataset.repo,
            dataset.files[split],
            repo_type="dataset",
            revision=dataset.revision,
            local_files_only=local_files_only,
        )

    try:
        return download(local_files_only=True)
    except LocalEntryNotFoundError:
        hub.probe()
        return download(local_files_only=False)


def _short(error: Exception) -> str:
    """First line of an exception's message, or else its type, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
