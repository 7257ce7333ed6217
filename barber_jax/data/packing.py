"""Text to train on: windows of token ids, packed without padding, in an order that depends on a seed alone."""

import contextlib
import hashlib
import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand, writing
from barber_jax.data import sampling, text
from barber_jax.data.calibration import check_ids, existing_file, load_ids
from barber_jax.data.local import iterate_documents, pieces
from barber_jax.data.streams import Stream, open_stream

if TYPE_CHECKING:
    from grain import DatasetIterator
    from transformers import PreTrainedTokenizerBase

IN_MEMORY = 1 << 26
"""Tokens of text that are kept in memory (256 MiB); more are kept in a file."""


class Windows(Sequence):
    """Some of the consecutive windows into which each row of an array of ids is cut, each int32 [L].

    Args:
        ids: [rows, columns] ids of any integer dtype, in memory or memory-mapped; columns beyond the last whole window
            of a row are left out.
        length: L, the tokens of a window.
        chosen: which windows, counted through all rows; None for all.
    """

    def __init__(self, ids: np.ndarray, length: int, chosen: np.ndarray | None = None):
        self.ids, self._length, self._per_row = ids, length, ids.shape[1] // length
        self._chosen = np.arange(ids.shape[0] * self._per_row) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        row, window = divmod(int(self._chosen[index]), self._per_row)
        return np.array(self.ids[row, window * self._length : (window + 1) * self._length], np.int32)

    def split(self, held_out: int, seed: int) -> tuple["Windows", np.ndarray]:
        """Hold out some windows, drawn by the seed: the other ones, in order; and int32 [held_out, L]."""
        # Not by the seed alone: calibration draws its samples of the same text by it, and what a pruned model was
        # fitted to must be no judge of it.
        held = sorted(random.Random(f"held out {seed}").sample(range(len(self)), held_out))
        rest = Windows(self.ids, self._length, np.delete(self._chosen, held))
        return rest, np.array([self[index] for index in held], np.int32).reshape(held_out, self._length)


@dataclass(frozen=True)
class PackedText:
    """Windows of token ids, packed from text without padding.

    Attributes:
        windows: int32 [L] windows to train on, read when they are asked for where the ids are memory-mapped.
        held_out: int32 [H, L] windows that are never trained on.
    """

    windows: Windows
    held_out: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens to train on."""
        return len(self.windows) * self.held_out.shape[1]


def open_text(
    source: str,
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    *,
    length: int,
    seed: int,
    held_out: int,
    needed: int,
    vocab_size: int,
    text_field: str = "text",
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> PackedText:
    """Cut text into windows to train on and windows to hold out; the same arguments always give the same windows.

    `source` is what `load_calibration` takes:
        a .npy file: ids [tokens], one text, or [rows, columns], of which each row is cut into windows; memory-mapped.
        wikitext2, ptb: the training split, joined by blank lines (ptb: by spaces).
        c4, or another path: documents joined by blank lines, without exact duplicates and null rows. Of more than 4
            million characters, and of c4, so many documents as are needed are chosen at random (`streams`).

    All windows of a text that is used whole are drawn from for those held out; else these come from the documents that
    are first in the random order. They do not depend on `needed`. Text is tokenized with the special tokens that the
    tokenizer adds by default, at the ends of the whole text or, above 4 million characters, of each 500,000.

    Args:
        source: see above.
        tokenizer: returns the model's tokenizer; not called for .npy.
        length: tokens in each window, L.
        seed: seed of every random choice.
        held_out: number of windows to hold out, H.
        needed: number of tokens that a run will train on. Of large text about a tenth more are tokenized. Text that has
            fewer is all used.
        vocab_size: ids must be in [0, vocab_size).
        text_field: name of the text field, for a local file with fields.
        cache: folder for the windows of text of more than `IN_MEMORY` tokens, which are memory-mapped; used again by
            a later call that needs the same ones. None to keep any text in memory.
        say: prints a line: how many rows are null.

    Raises:
        BarberError: `source` is missing, damaged or of an unknown kind; the text is too short for the windows to hold
            out and one to train on; an id is outside the vocabulary; the cache cannot be written.
    """
    for option, value, least in (("length", length, 1), ("held-out", held_out, 0), ("tokens", needed, 1)):
        if value < least:
            raise BarberError(f"--{option} {value}: it must be at least {least}")
    nulls = 0
    if source.lower().endswith(".npy"):
        ids = _npy_rows(expand(source))
    elif source in text.SEPARATORS:
        joint = text.SEPARATORS[source]
        blocks = chain.from_iterable((document, joint) for document in text.hub_documents(source, "train"))
        ids = sampling.stretch_ids(tokenizer(), blocks)[None]
    else:
        ids = None
        if source not in text.HUB_DATASETS:
            ids, nulls = sampling.small_ids(existing_file(source), text_field, tokenizer)
            ids = None if ids is None else ids[None]
    if ids is not None:
        windows = Windows(ids, length)
        _check_enough(source, ids.size, len(windows), held_out, length)
        windows, held = windows.split(held_out, seed)
    else:
        stream = open_stream(
            _documents(source, text_field, sampling.longest_piece(length)),
            tokenizer(),
            held_out=held_out * length,
            needed=needed,
            seed=seed,
        )
        nulls = stream.nulls
        ids = _gather(stream, length, cache)
        count = len(stream.held_out) // length + len(ids)
        _check_enough(source, len(stream.held_out) + ids.size, count, held_out, length)
        windows, held = Windows(ids, length), stream.held_out.reshape(held_out, length)
        check_ids(source, held, vocab_size)
    # One row is checked as a stream of ids, so that not all of it is read at once.
    check_ids(source, ids[0] if len(ids) == 1 else ids, vocab_size)
    if nulls and say:
        say(text.null_rows(source, nulls))
    return PackedText(windows, held)


def batches(
    text: PackedText, *, batch: int, seed: int, process: int = 0, processes: int = 1
) -> "DatasetIterator[np.ndarray]":
    """Iterate endlessly over this process's rows, int32 [batch // processes, L], of batches of training windows.

    Every window comes once before any comes again, each time in another random order; a batch may hold the last windows
    of one such epoch and the first of the next. The order depends on `seed` alone: the rows of all processes, joined in
    the order of processes, are the batch of one process. `get_state()` is a small dictionary that JSON can hold, the
    same in all processes, and may be set with another number of processes.

    Args:
        batch: windows in a batch of all processes together.
        seed: seed of the order.
        process: index of this process.
        processes: number of processes.

    Raises:
        BarberError: there are too few windows for one batch, or `batch` is not divisible by `processes`.
    """
    if batch < 1 or batch % processes:
        raise BarberError(f"--batch {batch} must be a multiple of the number of processes, {processes}")
    check_batch(text, batch)
    # It imports JAX and Orbax, which takes a second or two.
    import grain

    # grain takes seeds of 32 bits, and shuffles epoch n of seed s as epoch 0 of seed s + n.
    mixed = int.from_bytes(hashlib.blake2b(f"order {seed}".encode(), digest_size=4).digest())
    shares = grain.MapDataset.source(text.windows).shuffle(seed=mixed).repeat().batch(batch // processes)
    # By default hundreds of batches are read ahead.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(shares[process::processes].to_iter_dataset(ahead))


def check_batch(text: PackedText, batch: int) -> None:
    """Raise BarberError if there are too few windows to train on for one batch."""
    if len(text.windows) < batch:
        length = text.held_out.shape[1]
        raise BarberError(
            f"the text has {text.tokens} tokens to train on, but --batch {batch} x --length {length} needs "
            f"{batch * length}; lower --batch or --length, or give more text"
        )


def _npy_rows(path: Path) -> np.ndarray:
    ids = load_ids(path)
    if ids.ndim not in (1, 2):
        raise BarberError(f"{path}: shape {ids.shape} has {ids.ndim} axes; give token ids [tokens] or [rows, columns]")
    return ids[None] if ids.ndim == 1 else ids


def _documents(source: str, text_field: str, longest: int) -> Callable[[], Iterable[str | None]]:
    if source not in text.HUB_DATASETS:
        return lambda: iterate_documents(existing_file(source), text_field, longest)
    rows = text.hub_documents(source, "train")
    return lambda: chain.from_iterable(pieces(row, longest) for row in rows)


def _check_enough(source: str, tokens: int, windows: int, held_out: int, length: int) -> None:
    if windows <= held_out:
        kept = f"{held_out} windows of --length {length} to hold out and one to train on need"
        raise BarberError(
            f"{source}: {tokens} tokens ({windows} windows), but {kept} {(held_out + 1) * length}; "
            "lower --length or --held-out, or give more text"
        )


def _gather(stream: Stream, length: int, cache: Path | None) -> np.ndarray:
    """The whole windows of a stream to train on, int32 [windows, length], in memory or in a file of the cache."""
    if cache is None or stream.estimate <= IN_MEMORY:
        ids = np.concatenate(list(stream.parts()))
        return ids[: len(ids) // length * length].reshape(-1, length)
    # The key stands for the ids, so that a file of this name holds these windows, whichever run wrote it.
    path = expand(cache) / f"windows-{length}-{stream.key}.npy"
    with contextlib.suppress(BarberError):
        return load_ids(path)
    # There is none yet, or a damaged one.
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_windows(path, stream.parts(), length)
    return load_ids(path)


def _write_windows(path: Path, parts: Iterator[np.ndarray], length: int) -> None:
    """Write windows to a .npy as they come; the file is there when all are written."""
    # Processes on several machines may write it at the same time, and have the same number.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(unfinished, "wb") as handle:
            count, rest = 0, np.zeros(0, np.int32)
            _write_header(handle, count, length)
            for part in parts:
                rest = np.concatenate([rest, part])
                whole = len(rest) // length
                handle.write(rest[: whole * length].astype("<i4").tobytes())
                count, rest = count + whole, rest[whole * length :]
            handle.seek(0)
            # NumPy leaves room in a header for any number of rows.
            _write_header(handle, count, length)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _write_header(handle, windows: int, length: int) -> None:
    np.lib.format.write_array_header_1_0(handle, {"descr": "<i4", "fortran_order": False, "shape": (windows, length)})
