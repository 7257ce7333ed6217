"""Loads calibration samples: token ids cut from text by the conventions of the pruning literature."""

import functools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched, expand
from barber_jax.console.options import OptionGroup
from barber_jax.data import sampling, text
from barber_jax.data.begin import BeginToken, begin_id, begun, tokenizer_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Consecutive draws of a too short document before giving up. About one C4 document in forty is longer than 2048 tokens,
# one in a thousand longer than 8192.
_MAX_MISSES = 20_000
_CHECKED_AT_ONCE = 1 << 22
SELF = "self"
"""Calibration samples that the dense model writes itself."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(OptionGroup):
    """Calibration data."""

    calibration: str = "c4"
    """c4, wikitext2, ptb, a text file or folder, .npy ids, self (written by the model) or self+TEXT (half of each)."""
    text_field: str = "text"
    """Name of the text column, in files with columns."""
    samples: int = 128
    """Number of calibration samples."""
    length: int = 2048
    """Number of tokens in each sample."""
    seed: int = 0
    """Seed of the sampling."""

    def settle(self) -> None:
        if not self.calibration:
            # An empty path would mean the current folder.
            raise BarberError("--calibration is empty; name a dataset or a file")
        written, text_source = split_source(self.calibration)
        if written and text_source == "":
            raise BarberError(f"--calibration {self.calibration}: no text after the +; name one, or give {SELF} alone")
        self._require_least(1, "samples", "length")
        self._require_least(0, "seed")
        if self.length < 2:
            raise BarberError("--length 1 leaves no next token; use at least 2")
        if written and text_source and self.samples < 2:
            raise BarberError(f"--calibration {self.calibration}: half of --samples 1 is none; use at least 2")


def load_calibration(
    source: str,
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    text_field: str = "text",
    say: Callable[[str], None] | None = None,
    begin: BeginToken = "auto",
) -> np.ndarray:
    """Load calibration token ids, int32 [samples, length]; the same arguments always give the same ids.

    `source` is one of:
        a .npy file: ids [rows, columns], of which the first `samples` rows and `length` columns are used, in order.
        c4: sampled as by Wanda: documents are drawn at random, with replacement, from the first training shard; each
            that is longer than `length` tokens gives one random window.
        wikitext2, ptb: random windows of the training split, joined by blank lines (ptb: by spaces) and tokenized once.
        another path: the documents read by `local.iterate_documents`, without exact duplicates and null rows. Up to
            4 million characters of them are joined by blank lines, tokenized once and cut into consecutive windows
            without overlap, of which `samples` are drawn at random without replacement. Of more text, documents in
            random order are joined and tokenized until there is enough for `samples` such windows, which are used in
            this order (`sampling.sample_ids`).

    Text is tokenized with the special tokens that the tokenizer adds by default, at the ends of the whole text or, for
    c4, of each document.

    Args:
        source: see above.
        tokenizer: returns the model's tokenizer; not called for .npy.
        samples: number of samples.
        length: tokens in each sample.
        seed: seed of every random choice.
        vocab_size: ids must be in [0, vocab_size).
        text_field: name of the text field, for a local file with fields.
        say: prints a line: how many rows are null.
        begin: `always` puts the begin token in front of each sample of text, in place of its last token, and like
            `never` leaves out what the tokenizer adds. Token ids (.npy) are used as they are.

    Raises:
        BarberError: `samples` or `length` is below 1; `source` is missing, damaged or of an unknown kind; there is too
            little text or there are too few rows; an id is outside the vocabulary.
    """
    for option, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise BarberError(f"--{option} {value}: it must be at least 1")
    if source.lower().endswith(".npy"):
        windows = _npy_windows(expand(source), samples, length)
    else:
        tokenizer = functools.cache(tokenizer)
        first = begin_id(begin, tokenizer)
        cut = (tokenizer_for(begin, tokenizer), samples, length - (first is not None))
        windows = begun(_text_windows(source, *cut, seed, text_field, say), first)
    check_ids(source, windows, vocab_size)
    return windows.astype(np.int32)


def split_source(source: str) -> tuple[bool, str | None]:
    """Whether the model itself writes samples, and the text that the others are cut from.

    (True, None) for `self`; (True, "prose.txt") for `self+prose.txt`; (False, "prose.txt") for prose.txt.
    """
    if source == SELF:
        return True, None
    written = source.startswith(f"{SELF}+")
    return written, source.removeprefix(f"{SELF}+") if written else source


def _text_windows(
    source: str,
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    samples: int,
    length: int,
    seed: int,
    text_field: str,
    say: Callable[[str], None] | None,
) -> np.ndarray:
    if source in text.HUB_DATASETS:
        return _hub_windows(source, tokenizer, samples, length, random.Random(seed))
    windows, nulls = _file_windows(source, tokenizer, text_field, samples, length, seed)
    if nulls and say:
        say(text.null_rows(source, nulls))
    return windows


def check_source(source: str) -> None:
    """Raise `BarberError` if a source of `load_calibration` is no dataset and no file, or token ids that are no ids.

    For a run that does not use it: a wrong name there is a mistake all the same.
    """
    if source.lower().endswith(".npy"):
        load_ids(expand(source))
    elif source not in text.HUB_DATASETS:
        existing_file(source)


def load_ids(path: Path) -> np.ndarray:
    """Open the token ids in a .npy file, of any integer dtype and shape, as a memory map.

    Raises:
        BarberError: the file is missing, damaged, empty or not a single array, or its dtype is not an integer type.
    """
    check_fetched(path)
    try:
        with warnings.catch_warnings():
            # Of a damaged header: the error says it.
            warnings.simplefilter("ignore")
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise BarberError(f"{path}: no such file; give a .npy of token ids") from error
    except Exception as error:
        if "object" in str(error).lower():
            raise BarberError(
                f"{path}: cannot be read as .npy of token ids: it holds Python objects; write it again as int32"
            ) from error
        raise BarberError(f"{path}: cannot be read as .npy; write it again with numpy.save") from error
    if not isinstance(ids, np.ndarray):
        raise BarberError(f"{path}: an archive of several arrays; write one array with numpy.save")
    # By its kind: NumPy counts timedelta64 among the integer types.
    if ids.dtype.kind not in "iu":
        raise BarberError(f"{path}: holds {ids.dtype}, but token ids must be integers; write it again as int32")
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
    if name not in text.SEPARATORS:
        return _document_windows(name, documents, tokenizer(), samples, length, rng)
    ids = text.tokenize(tokenizer(), text.SEPARATORS[name].join(documents))
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
    """Draw a random window from each of `samples` random documents that are longer than `length` tokens."""
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
    # The bounds of Wanda and SparseGPT, so that a seed draws the same windows; they never draw the last window.
    start = rng.randint(0, len(ids) - length - 1)
    return ids[start : start + length]


def existing_file(source: str) -> Path:
    """The path of a source that is no dataset; `BarberError` if nothing is there."""
    path = expand(source)
    if not path.exists():
        known = ", ".join(text.HUB_DATASETS)
        raise BarberError(
            f"{source}: neither a dataset ({known}) nor a file; give one of these, .npy, {text.FILE_TYPES}"
        )
    return path


def _file_windows(
    source: str,
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    text_field: str,
    samples: int,
    length: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """Windows of a local file, and its number of null rows."""
    path = existing_file(source)
    ids, nulls = sampling.small_ids(path, text_field, tokenizer)
    small = ids is not None
    if not small:
        ids, nulls = sampling.sample_ids(path, text_field, tokenizer(), samples * length, length, seed)
    count = len(ids) // length
    if count < samples:
        raise BarberError(
            f"{source}: {len(ids)} tokens, but {samples} samples of {length} need {samples * length}"
            f"{f' ({nulls} rows are null)' if nulls else ''}; "
            "lower --samples or length, or give more text"
        )
    # A small text's windows are drawn without replacement; those of a large one are in random order already.
    chosen = random.Random(seed).sample(range(count), samples) if small else range(samples)
    return ids[: count * length].reshape(count, length)[chosen], nulls


def check_ids(source: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise BarberError unless all ids are in [0, vocab_size); the message names the first that is not.

    Memory-mapped ids are read a part at a time.
    """
    rows = max(1, _CHECKED_AT_ONCE // max(1, ids[:1].size))
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        outside = np.argwhere((part < 0) | (part >= vocab_size))
        if len(outside):
            first, *others = outside[0].tolist()
            raise BarberError(
                f"{source}: id {part[first, *others]} at {[start + first, *others]} is outside the model's vocabulary "
                f"[0, {vocab_size}); tokenize with this model's own tokenizer"
            )
