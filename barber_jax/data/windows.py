"""Evaluation texts as windows of token ids, by the conventions of the pruning literature (GPTQ, SparseGPT, Wanda).

A text is tokenized whole and cut into consecutive windows of L tokens from its start; a last incomplete window is
dropped. wikitext2 is the raw test split joined by blank lines; ptb the test sentences joined by a space; c4 the first
1100 documents of the first validation shard joined by a space, of which 256 windows are used. A local file's documents
are joined by blank lines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.data import text
from barber_jax.data.calibration import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_DOCUMENTS, C4_WINDOWS = 1100, 256


def evaluation_ids(
    tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    *,
    path: Path | None = None,
    dataset: str | None = None,
    text_field: str = "text",
) -> np.ndarray:
    """All token ids of an evaluation text, int32 [tokens], by the conventions above. Give `path` or `dataset`.

    Args:
        tokenizer: gives the model's tokenizer.
        text_field: field with the text, for a local file that has fields.

    Raises:
        BarberError: the text cannot be read, or there is no tokenizer.
    """
    if path is not None:
        whole = "\n\n".join(text.read_documents(path, text_field))
    elif dataset == "c4":
        documents = text.hub_documents("c4", "validation")
        whole = " ".join(documents[i] for i in range(min(C4_DOCUMENTS, len(documents))))
    else:
        whole = {"wikitext2": "\n\n", "ptb": " "}[dataset].join(text.hub_documents(dataset, "test"))
    return text.tokenize(tokenizer(), whole)


def cut_windows(ids: np.ndarray, length: int, windows: int | None, source: str, vocabulary: int) -> np.ndarray:
    """Consecutive windows from the start: [tokens] -> int32 [windows, length].

    Raises:
        BarberError: the text is too short for that many, or for one; an id outside [0, vocabulary).
    """
    whole = ids.size // length
    wanted = whole if windows is None else windows
    if wanted < 1 or wanted > whole:
        raise BarberError(
            f"{source}: {ids.size} tokens give {whole} windows of --length {length}, not {max(wanted, 1)}; "
            "ask for fewer windows, lower --length or give more text"
        )
    cut = np.asarray(ids).reshape(-1)[: wanted * length].reshape(wanted, length)
    # In the ids' own dtype: an id too large for int32 would come round to a small one.
    check_ids(source, cut, vocabulary)
    return cut.astype(np.int32)
