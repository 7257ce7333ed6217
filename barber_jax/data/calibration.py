"""Calibration sequences: token ids cut out of text by the conventions of the pruning literature."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup
from barber_jax.data import text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How the documents of a Hub dataset become one text; C4 has none, its windows stay inside one document.
_JOINTS = {"wikitext2": "\n\n", "ptb": " "}
# About one C4 document in forty is longer than 2048 tokens, one in a thousand longer than 8192.
_MAX_MISSES = 20_000


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(OptionGroup):
    """What the model is calibrated on."""

    calibration: str = "c4"
    """c4, wikitext2, ptb, a .txt/.jsonl/.parquet/.arrow file, a saved dataset folder, or .npy token ids."""
    text_field: str = "text"
    """Column that holds the text, in files with columns."""
    samples: int = 128
    """Calibration samples."""
    length: int = 2048
    """Tokens in each sample."""
    seed: int = 0
    """Seed of the sampling."""

    def settle(self) -> None:
        if not self.calibration:
            # As a path it would mean the current folder.
            raise BarberError("--calibration is empty; name what to read")
        self._require_least(1, "samples", "length")
        self._require_least(0, "seed")
        if self.length < 2:
            raise BarberError("--length 1 leaves no next token; use at least 2")


def load_calibration(
    source: str,
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    text_field: str = "text",
) -> np.ndarray:
    """Calibration token ids, int32 [samples, length]; the same arguments always give the same ids.

    What `source` may be:
        a .npy file: ids [rows, columns]; the first `samples` rows and `length` columns, in order, nothing random.
        c4: as Wanda samples it: documents drawn at random (with replacement) from the first training shard, kept
            when longer than `length` tokens, and a random window of each.
        wikitext2, ptb: the training split joined by a blank line (ptb: a space), tokenized once, random windows.
        another path: documents of `text.read_documents` with exact duplicates dropped (the first stays), joined by
            a blank line, tokenized once, cut into consecutive windows that do not overlap, and a random choice of
            these without replacement.

    Text is tokenized with the special tokens the tokenizer adds by default, at the ends of the whole text or, for
    c4, of each document.

    Args:
        source: see above.
        tokenizer: gives the model's tokenizer; not called for .npy.
        samples: number of sequences.
        length: tokens in each.
        seed: of every random choice.
        vocab_size: ids must lie in [0, vocab_size).
        text_field: field with the text, for a local file that has fields.

    Raises:
        BarberError: `samples` or `length` below 1; `source` missing, damaged or of an unknown kind; too little text
            or too few rows; an id outside the vocabulary.
    """
    for option, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise BarberError(f"--{option} {value}: it must be at least 1")
    if source.endswith(".npy"):
        windows = _npy_windows(Path(os.path.expanduser(source)), samples, length)
    elif source in text.HUB_DATASETS:
        windows = _hub_windows(source, tokenizer, samples, length, random.Random(seed))
    else:
        ids = _file_ids(source, tokenizer, text_field)
        windows = _disjoint_windows(source, ids, samples, length, random.Random(seed))
    check_ids(source, windows, vocab_size)
    return windows.astype(np.int32)


def load_ids(path: Path) -> np.ndarray:
    """Token ids of a .npy file, of any integer dtype and shape, mapped and not yet read.

    Raises:
        BarberError: missing, damaged, not one array, empty, or not integers.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise BarberError(f"{path}: no such file; give a .npy of token ids") from error
    except Exception as error:
        raise BarberError(f"{path}: cannot be read as .npy; write it anew with numpy.save") from error
    if not isinstance(ids, np.ndarray):
        raise BarberError(f"{path}: an archive of several arrays; write one array with numpy.save")
    if not np.issubdtype(ids.dtype, np.integer):
        raise BarberError(f"{path}: holds {ids.dtype}, but token ids must be integers; write it anew as int32")
    if ids.size == 0:
        raise BarberError(f"{path}: shape {ids.shape} holds no ids; give token ids")
    return ids


def _npy_windows(path: Path, samples: int, length: int) -> np.ndarray:
    rows = load_ids(path)
    if rows.ndim != 2:
        raise BarberError(f"{path}: shape {rows.shape} has {rows.ndim} axes; give token ids [samples, length]")
    if rows.shape[0] < samples:
        raise BarberError(f"{path}: {rows.shape[0]} rows, but --samples is {samples}; lower it or give more rows")
    if rows.shape[1] < length:
        raise BarberError(f"{path}: {rows.shape[1]} columns, but --length is {length}; lower it or give longer rows")
    return np.array(rows[:samples, :length])


def _hub_windows(
    name: str, tokenizer: Callable[[], "PreTrainedTokenizerBase"], samples: int, length: int, rng: random.Random
) -> np.ndarray:
    documents = text.hub_documents(name, "train")
    if name not in _JOINTS:
        return _document_windows(name, documents, tokenizer(), samples, length, rng)
    ids = text.tokenize(tokenizer(), _JOINTS[name].join(documents))
    if len(ids) <= length:
        raise BarberError(f"{name}: {len(ids)} tokens, but a window of {length} needs more than that; lower --length")
    return np.stack([_random_window(ids, length, rng) for _ in range(samples)])


def _document_windows(
    name: str,
    documents: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    length: int,
    rng: random.Random,
) -> np.ndarray:
    """A random window from each of `samples` random documents longer than `length` tokens."""
    windows: list[np.ndarray] = []
    short: set[int] = set()
    misses = 0
    while len(windows) < samples:
        if len(short) == len(documents) or misses == _MAX_MISSES:
            raise BarberError(
                f"{name}: no document longer than {length} tokens among {len(short)} of {len(documents)} tried; "
                "lower --length"
            )
        misses += 1
        index = rng.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = text.tokenize(tokenizer, documents[index])
        if len(ids) > length:
            windows.append(_random_window(ids, length, rng))
            misses = 0
        else:
            short.add(index)
    return np.stack(windows)


def _random_window(ids: np.ndarray, length: int, rng: random.Random) -> np.ndarray:
    # Wanda's and SparseGPT's bounds, so that a seed draws the windows it draws there: the last one is never taken.
    start = rng.randint(0, len(ids) - length - 1)
    return ids[start : start + length]


def _file_ids(source: str, tokenizer: Callable[[], "PreTrainedTokenizerBase"], text_field: str) -> np.ndarray:
    path = Path(os.path.expanduser(source))
    if not path.exists():
        known = ", ".join(text.HUB_DATASETS)
        raise BarberError(
            f"{source}: neither a dataset ({known}) nor a file; give one of these, .npy, {text.FILE_TYPES}"
        )
    documents = dict.fromkeys(text.read_documents(path, text_field))
    return text.tokenize(tokenizer(), "\n\n".join(documents))


def _disjoint_windows(source: str, ids: np.ndarray, samples: int, length: int, rng: random.Random) -> np.ndarray:
    """`samples` of the consecutive windows of `length`, chosen without replacement, in the order they are drawn."""
    count = len(ids) // length
    if count < samples:
        raise BarberError(
            f"{source}: {len(ids)} tokens, but {samples} samples of {length} need {samples * length}; "
            "lower --samples or length, or give more text"
        )
    chosen = rng.sample(range(count), samples)
    return ids[: count * length].reshape(count, length)[chosen]


def check_ids(source: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise BarberError unless all ids lie in [0, vocab_size); the message names the first that does not."""
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        place = tuple(outside[0].tolist())
        raise BarberError(
            f"{source}: id {ids[place]} at {list(place)} is outside the model's vocabulary [0, {vocab_size}); "
            "tokenize with this model's own tokenizer"
        )
