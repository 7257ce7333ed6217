"""Reads and tokenizes text from local files and Hub datasets, for calibration and perplexity evaluation."""

import contextlib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console import causes
from barber_jax.console.errors import BarberError
from barber_jax.console.quiet import held_output
from barber_jax.data import hub
from barber_jax.data.columns import short
from barber_jax.data.local import FILE_TYPES, iterate_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

SEPARATORS = {"wikitext2": "\n\n", "ptb": " "}
"""What joins the documents of a dataset into one text. The documents of C4 have nothing to do with each other."""


def read_documents(path: Path, text_field: str = "text") -> list[str]:
    """Read all documents of a local file or folder in order, including duplicates and empty ones.

    Rows without text (null) are left out.

    Args:
        path: see `local.iterate_documents`.
        text_field: name of the text field; .txt has none.

    Raises:
        BarberError: `path` cannot be read (`local.iterate_documents`), or holds no documents.
    """
    rows = list(iterate_documents(path, text_field))
    documents = [row for row in rows if row is not None]
    if not documents:
        raise no_text(path, len(rows))
    return documents


def no_text(path: Path | str, nulls: int) -> BarberError:
    """The error for a local file without documents, of which `nulls` rows are null."""
    return BarberError(f"{path}: holds no {'text: every row is null' if nulls else 'rows'}; give one with text")


def null_rows(source: Path | str, nulls: int) -> str:
    """The line that says how many rows of a local file are left out."""
    return f"{source}: left out {nulls} row{'s' if nulls > 1 else ''} without text (null)"


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
        return _load(dataset.builder, _hub_file(dataset, split))[dataset.field]
    except Exception as error:
        raise BarberError(
            f"{name}: cannot get {dataset.repo} from the Hub ({short(error)}); "
            f"connect, or give a local file instead ({FILE_TYPES})"
        ) from error


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> np.ndarray:
    """Tokenize a whole text into int32 [tokens], without truncation, with the special tokens the tokenizer adds."""
    # verbose=False: no warning about texts longer than the model's context, since they are cut into windows later.
    with tokenizing(tokenizer):
        ids = tokenizer(text, truncation=False, padding=False, return_attention_mask=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)


@contextlib.contextmanager
def tokenizing(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Context manager that turns a failure of a tokenizer at its work into a `BarberError`.

    A damaged tokenizer.json may be loaded without complaint, and panic at the first text.
    """
    try:
        with held_output():
            yield
    except BaseException as error:
        if isinstance(error, BarberError) or not causes.is_foreign(error):
            raise
        where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise BarberError(
            f"{where}: its tokenizer fails on the text ({short(error)}); fetch its files again or give ids (.npy)"
        ) from error


def _load(builder: str, path: str):
    from datasets import load_dataset

    # data_files are glob patterns, so brackets in a name must be escaped.
    return load_dataset(builder, data_files=glob.escape(path), split="train")


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
