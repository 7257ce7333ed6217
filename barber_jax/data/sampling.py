"""Token ids of local text in bounded memory.

A tokenizer takes about 150 bytes for every character of a text, so only a text of up to `SMALL` characters is tokenized
as a whole. Of a larger one, calibration and recovery tokenize documents chosen by the seed (recovery: `streams`), and
evaluation one stretch after another.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.data import text
from barber_jax.data.local import documents_of, iterate_documents, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL = 4_000_000
"""Characters of a text that is tokenized as a whole; for calibration, without exact duplicates of documents."""
STRETCH = 500_000
"""Characters that are tokenized at once, of a larger text."""
CHARACTERS_PER_TOKEN = 16
"""More than most texts have. Where it is too little, more of the text is held and the file is read once more."""
JOINT = "\n\n"
"""What stands between two documents of local text."""
_LONGEST_PIECE = 1 << 16


def read_small(path: Path, text_field: str) -> tuple[dict[str, None] | None, int]:
    """Read the distinct documents of a local file or folder, in order, if they have up to `SMALL` characters.

    Returns:
        The documents as the keys of a dictionary, None if there is more text; and the number of null rows among those
        read.

    Raises:
        BarberError: the file cannot be read, or holds no documents.
    """
    documents: dict[str, None] = {}
    nulls = size = 0
    for document in iterate_documents(path, text_field, longest=SMALL + 1):
        if document is None:
            nulls += 1
        elif document not in documents:
            documents[document] = None
            size += len(document)
            if size > SMALL:
                return None, nulls
    if not documents:
        raise text.no_text(path, nulls)
    return documents, nulls


def small_ids(
    path: Path, text_field: str, tokenizer: Callable[[], "PreTrainedTokenizerBase"]
) -> tuple[np.ndarray | None, int]:
    """Tokenize the distinct documents of a local file or folder as a whole, joined by blank lines.

    Returns:
        int32 [tokens] ids, None if there are more than `SMALL` characters; and the number of null rows among those
        read.

    Raises:
        BarberError: the file cannot be read, or holds no documents.
    """
    documents, nulls = read_small(path, text_field)
    return None if documents is None else text.tokenize(tokenizer(), JOINT.join(documents)), nulls


def longest_piece(length: int) -> int:
    """Characters above which a document of a large text is cut, where samples have `length` tokens."""
    return max(_LONGEST_PIECE, CHARACTERS_PER_TOKEN * length)


def sample_ids(
    path: Path, text_field: str, tokenizer: "PreTrainedTokenizerBase", needed: int, length: int, seed: int
) -> tuple[np.ndarray, int]:
    """Tokenize documents of a large file in a random order until there are `needed` tokens.

    The order is that of a hash of seed and document, so that it is the same wherever a document stands, and exact
    duplicates count once. Documents longer than the larger of 65,536 characters and 16 for each of `length` tokens are
    cut at lines or words, and their pieces count as documents. Documents are joined by blank lines and tokenized in
    stretches, with the special tokens that the tokenizer adds at the ends of each.

    Args:
        needed: number of tokens wanted.
        length: tokens of a sample.
        seed: seed of the order.

    Returns:
        int32 [needed] ids, fewer only if the whole file has fewer; and the number of null rows.

    Raises:
        BarberError: the file cannot be read.
    """
    longest = longest_piece(length)
    budget = max(SMALL, CHARACTERS_PER_TOKEN * needed)
    while True:
        chosen, order = Chosen(budget), Order(seed)
        nulls = 0
        for document in iterate_documents(path, text_field, longest):
            if document is None:
                nulls += 1
            elif document.strip():
                chosen.offer(document, order.place(document))
        joined = chain.from_iterable((document, JOINT) for document in chosen.in_order())
        ids = stretch_ids(tokenizer, joined, needed)
        if len(ids) == needed or chosen.complete:
            return ids, nulls
        budget *= 4


class Order:
    """The random order of documents that a seed gives: that of a keyed hash."""

    def __init__(self, seed: int):
        self._key = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()

    def place(self, document: str) -> int:
        """A number of 128 bits by which documents are ordered; the same for exact duplicates alone."""
        return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=16, key=self._key).digest())


class Chosen:
    """The first documents, by their places in an order, that have `budget` characters together.

    Attributes:
        complete: whether these are all documents that were offered.
    """

    def __init__(self, budget: int):
        self.complete = True
        self._budget, self._size = budget, 0
        # A heap with the last document in front.
        self._heap: list[tuple[int, str]] = []
        self._places: set[int] = set()

    def offer(self, document: str, place: int) -> None:
        if place in self._places:
            return
        if self._size >= self._budget and place > -self._heap[0][0]:
            self.complete = False
            return
        heapq.heappush(self._heap, (-place, document))
        self._places.add(place)
        self._size += len(document)
        while self._size - len(self._heap[0][1]) >= self._budget:
            dropped, last = heapq.heappop(self._heap)
            self._places.remove(-dropped)
            self._size -= len(last)
            self.complete = False

    def in_order(self) -> list[str]:
        return [document for _, document in sorted(self._heap, reverse=True)]


def whole_ids(
    path: Path, text_field: str, tokenizer: "PreTrainedTokenizerBase", needed: int | None = None
) -> tuple[np.ndarray, int]:
    """Tokenize all documents of a local file or folder in order, joined by blank lines.

    A text of more than `SMALL` characters is tokenized in stretches, with the special tokens that the tokenizer adds at
    the ends of each.

    Args:
        needed: number of tokens after which a larger text is not read further; None to tokenize all of it.

    Returns:
        int32 [tokens] ids; and the number of null rows among those read.

    Raises:
        BarberError: the file cannot be read, or holds no documents.
    """
    nulls = read = 0

    def blocks() -> Iterator[str]:
        nonlocal nulls, read
        for document in documents_of(path, text_field):
            if document is None:
                nulls += 1
                continue
            if read:
                yield JOINT
            read += 1
            yield from [document] if isinstance(document, str) else document

    rest, held, size = blocks(), [], 0
    for block in rest:
        held.append(block)
        size += len(block)
        if size > SMALL:
            return stretch_ids(tokenizer, chain(held, rest), needed), nulls
    if not read:
        raise text.no_text(path, nulls)
    return text.tokenize(tokenizer, "".join(held)), nulls


def stretch_ids(tokenizer: "PreTrainedTokenizerBase", blocks: Iterable[str], needed: int | None = None) -> np.ndarray:
    """Tokenize a text, given in consecutive blocks, in stretches of up to `STRETCH` characters.

    Returns:
        int32 ids [tokens], the first `needed` if that is given.
    """
    ids, count = [np.zeros(0, np.int32)], 0
    for stretch in stretches(tokenizer, blocks):
        ids.append(stretch)
        count += len(stretch)
        if needed is not None and count >= needed:
            break
    return np.concatenate(ids)[:needed]


def stretches(tokenizer: "PreTrainedTokenizerBase", blocks: Iterable[str]) -> Iterator[np.ndarray]:
    """`stretch_ids`, one stretch after another."""
    for stretch in pieces(blocks, STRETCH):
        yield text.tokenize(tokenizer, stretch)
