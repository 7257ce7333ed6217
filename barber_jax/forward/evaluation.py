"""The evaluation that commands make of the models they start from and write: perplexity on a text of the user's."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.data.begin import BeginToken, begin_id
from barber_jax.data.windows import cut_windows, default_windows, evaluation_ids
from barber_jax.forward.perplexity import perplexity
from barber_jax.models.family import Model


class Evaluated(Protocol):
    """Options of a command that evaluates: those of `EvaluationOptions`, and these.

    Attributes:
        begin_token: as `data.begin.settled` gives it.
        text_field: name of the text column, in files with columns.
        length: tokens in a window.
    """

    eval_text: Path | None
    eval_dataset: str | None
    eval_windows: int | None
    begin_token: BeginToken
    text_field: str
    length: int


def evaluation_windows(
    config: Evaluated, checkpoint: Checkpoint, model: Model, say: Callable[[str], None]
) -> np.ndarray | None:
    """Read the evaluation text as windows of token ids, int32 [windows, length]; None if none is given.

    To be called before the work, so that a text that cannot be read is reported at once. `say` prints a line.
    """
    if not (config.eval_text or config.eval_dataset):
        return None
    source = {"path": config.eval_text, "dataset": config.eval_dataset, "text_field": config.text_field}
    needed = config.eval_windows and config.eval_windows * config.length
    tokenizer = functools.cache(checkpoint.tokenizer)
    ids = evaluation_ids(tokenizer, **source, needed=needed, say=say, begin=config.begin_token)
    name = str(config.eval_text or config.eval_dataset)
    windows = config.eval_windows or default_windows(config.eval_dataset)
    return cut_windows(ids, config.length, windows, name, model.vocabulary, begin_id(config.begin_token, tokenizer))


def measure_perplexity(
    config: Evaluated,
    model: Model,
    windows: np.ndarray | None,
    progress: Progress,
    checkpoint: Checkpoint,
    name: str,
    batch: int | None = None,
) -> dict | None:
    """Measure the perplexity of a checkpoint on a run's evaluation text.

    Args:
        windows: from `evaluation_windows`.
        checkpoint: the model to measure.
        name: of it, for the progress line.
        batch: windows in a micro-batch.

    Returns:
        `source`, the name of the evaluation text, and what `perplexity` returns; None where there is none.
    """
    if windows is None:
        return None
    with progress.phase(f"perplexity of the {name}", model.layers, announce=True) as phase:
        measured = perplexity(checkpoint, model, windows, batch, phase=phase)
    return {"source": str(config.eval_text or config.eval_dataset), **measured}
