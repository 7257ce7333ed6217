"""Token ids of a text of any size, read as a stream: so many tokens to hold out, and about so many to train on.

Documents stand in a random order (`sampling.Order`). The first of them, in this order, are tokenized until there are
enough tokens to hold out; this does not depend on how many are trained on. As many documents behind them as are needed
are then read once more and tokenized in the order of the file. In memory are the documents to hold out, a hash and a
size of each document to train on, and one stretch.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.data import sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Documents = Callable[[], Iterable[str | None]]
"""Gives the documents of a text from the first on, each time it is called; None for a row without text."""

_MARGIN = 1.1
"""Documents to train on, over those that would be needed if all had as many tokens a character as the first ones."""
_LAST = 2**64 - 1


@dataclass(frozen=True)
class Stream:
    """Token ids of a text.

    Attributes:
        held_out: int32 ids to hold out: as many as asked for, unless the whole text has fewer.
        parts: gives the int32 ids to train on, in consecutive parts.
        estimate: how many ids these parts have, about.
        key: stands for the ids: it is different for other ids, but for hash collisions.
        nulls: number of rows without text.
    """

    held_out: np.ndarray
    parts: Callable[[], Iterator[np.ndarray]]
    estimate: int
    key: str
    nulls: int


def open_stream(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", *, held_out: int, needed: int, seed: int
) -> Stream:
    """Choose documents by the seed, and tokenize those to hold out.

    Exact duplicates count once, and blank documents not at all. Documents are joined by blank lines and tokenized in
    stretches, with the special tokens that the tokenizer adds at the ends of each.

    Args:
        documents: read twice or, where the first few suffice, once.
        held_out: number of tokens to hold out.
        needed: number of tokens to train on. About a tenth more are given, fewer only if the whole text has fewer.
        seed: seed of the order of documents.

    Raises:
        BarberError: the documents cannot be read.
    """
    order = sampling.Order(seed)
    budget = max(sampling.SMALL, sampling.CHARACTERS_PER_TOKEN * held_out)
    while True:
        chosen = sampling.Chosen(budget)
        later = _Places(budget + sampling.CHARACTERS_PER_TOKEN * int(_MARGIN * needed))
        nulls, contents = 0, hashlib.blake2b(digest_size=16)
        for document in documents():
            if document is None:
                nulls += 1
            elif document.strip():
                place = order.place(document)
                contents.update(place.to_bytes(16))
                chosen.offer(document, place)
                later.offer(_short(place), len(document) + len(sampling.JOINT))
        first, last, characters = _first_ids(chosen.in_order(), tokenizer, max(1, held_out))
        if len(first) >= held_out or chosen.complete:
            break
        budget *= 4
    training = first[held_out:]
    missing, per_token = max(0, needed - len(training)), characters / max(1, len(first))
    places, sizes = later.between(None if last is None else _short(order.place(last)), _MARGIN * per_token * missing)

    def parts() -> Iterator[np.ndarray]:
        yield training
        if len(places):
            again = _at_places(documents(), order, places)
            yield from sampling.stretches(tokenizer, (part for text in again for part in (text, sampling.JOINT)))

    contents.update(first.tobytes())
    contents.update(f"{held_out} {places[:1]} {places[-1:]}".encode())
    estimate = len(training) + int(sizes.sum() / per_token) if per_token else 0
    return Stream(first[:held_out], parts, estimate, contents.hexdigest(), nulls)


def _short(place: int) -> int:
    """The first 64 bits of a place: enough to tell documents apart that are only trained on."""
    return place >> 64


def _first_ids(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", needed: int
) -> tuple[np.ndarray, str | None, int]:
    """Tokenize documents until there are `needed` ids.

    Returns:
        int32 ids of all documents up to the last that was taken; that document; and the characters of these.
    """
    ids, count, last, characters = [np.zeros(0, np.int32)], 0, None, 0

    def taken() -> Iterator[str]:
        nonlocal last, characters
        for document in documents:
            # Not a return from the loop below: the rest of a document that was taken is still to be tokenized.
            if count >= needed:
                return
            last = document
            characters += len(document) + len(sampling.JOINT)
            yield from (document, sampling.JOINT)

    for stretch in sampling.stretches(tokenizer, taken()):
        ids.append(stretch)
        count += len(stretch)
    return np.concatenate(ids), last, characters


def _at_places(documents: Iterable[str | None], order: sampling.Order, places: np.ndarray) -> Iterator[str]:
    """The documents at these places (uint64, sorted), each once, in the order in which they are read."""
    wanted, (low, high) = len(places), (int(places[0]), int(places[-1]))
    seen = np.zeros(wanted, bool)
    for document in documents:
        if document is None or not document.strip() or not low <= (place := _short(order.place(document))) <= high:
            continue
        index = np.searchsorted(places, np.uint64(place))
        if places[index] == place and not seen[index]:
            seen[index] = True
            wanted -= 1
            yield document
            if not wanted:
                return


class _Places:
    """Places and sizes of the first documents, in the order of places, that have `budget` characters together."""

    def __init__(self, budget: float):
        self._budget, self._bound, self._full = budget, _LAST, 1 << 16
        self._places, self._sizes = array("Q"), array("I")

    def offer(self, place: int, size: int) -> None:
        if place <= self._bound:
            self._places.append(place)
            self._sizes.append(size)
            if len(self._places) >= self._full:
                self._settle()

    def _settle(self) -> tuple[np.ndarray, np.ndarray]:
        places, index = np.unique(np.array(self._places, np.uint64), return_index=True)
        sizes = np.array(self._sizes, np.int64)[index]
        kept = np.searchsorted(np.cumsum(sizes), self._budget) + 1
        if kept < len(places):
            places, sizes, self._bound = places[:kept], sizes[:kept], int(places[kept - 1])
        self._places, self._sizes = (
            array("Q", places.tobytes()),
            array("I", sizes.astype(np.uint32).tobytes()),
        )
        self._full = max(1 << 16, 2 * len(places))
        return places, sizes

    def between(self, last: int | None, characters: float) -> tuple[np.ndarray, np.ndarray]:
        """Places (uint64, sorted) and sizes of the documents behind `last` that have so many characters."""
        places, sizes = self._settle()
        start = 0 if last is None else np.searchsorted(places, np.uint64(last), side="right")
        stop = start + np.searchsorted(np.cumsum(sizes[start:]), characters) + (characters > 0)
        return places[start:stop], sizes[start:stop]
