"""Cuts evaluation texts into windows of token ids, by the conventions of GPTQ, SparseGPT and Wanda.

A text is tokenized as a whole and cut into consecutive windows of L tokens from its start; an incomplete last window is
dropped. wikitext2 is the raw test split joined by blank lines; ptb the test sentences joined by spaces; c4 the first
1100 documents of the first validation shard joined by spaces, of which 256 windows are used. The documents of a local
file are joined by blank lines; more than 4 million characters of them are tokenized in stretches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.data import sampling, text
from barber_jax.data.begin import BeginToken, begun, tokenizer_for
from barber_jax.data.calibration import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_DOCUMENTS, C4_WINDOWS = 1100, 256


def default_windows(source: str | None) -> int | None:
    """How many windows of a text are used where none are asked for: 256 of c4, all (None) of any other."""
    return C4_WINDOWS if source == "c4" else None


def evaluation_ids(
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    *,
    path: Path | None = None,
    dataset: str | None = None,
    text_field: str = "text",
    needed: int | None = None,
    say: Callable[[str], None] | None = None,
    begin: BeginToken = "auto",
) -> np.ndarray:
    """Tokenize a whole evaluation text into int32 [tokens], by the conventions above. Give `path` or `dataset`.

    Args:
        tokenizer: returns the model's tokenizer.
        path: a file or folder that `local.iterate_documents` reads.
        dataset: wikitext2, ptb or c4.
        text_field: name of the text field, for a local file with fields.
        needed: number of tokens that suffice, of a large local file; None for all.
        say: prints a line: how many rows are null.
        begin: unless `auto`, the ids are without special tokens; with `always`, `cut_windows` is to put the begin token
            in front.

    Raises:
        BarberError: the text cannot be read, or there is no tokenizer.
    """
    tokenizer = tokenizer_for(begin, tokenizer)
    if path is not None:
        ids, nulls = sampling.whole_ids(path, text_field, tokenizer(), needed)
        if nulls and say:
            say(text.null_rows(path, nulls))
        return ids
    if dataset == "c4":
        documents = text.hub_documents("c4", "validation")
        whole = " ".join(documents[i] for i in range(min(C4_DOCUMENTS, len(documents))))
    else:
        whole = text.SEPARATORS[dataset].join(text.hub_documents(dataset, "test"))
    return text.tokenize(tokenizer(), whole)


def cut_windows(
    ids: np.ndarray, length: int, windows: int | None, source: str, vocabulary: int, begin: int | None = None
) -> np.ndarray:
    """Cut token ids into consecutive windows from the start: [tokens] -> int32 [windows, length].

    Args:
        ids: token ids, of any integer dtype.
        length: tokens in each window.
        windows: number of windows; None for all.
        source: name of the text, for messages.
        vocabulary: number of tokens that the model knows.
        begin: id of a token that each window begins with; None for none.

    Raises:
        BarberError: the text is too short for that many windows, or for one; an id is outside [0, vocabulary).
    """
    cut_length = length - (begin is not None)
    available = ids.size // cut_length
    count = available if windows is None else windows
    if count < 1 or count > available:
        raise BarberError(
            f"{source}: {ids.size} tokens give {available} windows of --length {length}, not {max(count, 1)}; "
            "use fewer windows, lower --length or give more text"
        )
    cut = begun(np.asarray(ids).reshape(-1)[: count * cut_length].reshape(count, cut_length), begin)
    # Checked before the cast, which would wrap an id that is too large for int32 around to a small one.
    check_ids(source, cut, vocabulary)
    return cut.astype(np.int32)
