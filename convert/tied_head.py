"""Which matrix is the language-model head, where config.json and the stored tensors say different things.

What transformers 5 does: of a tied pair either side may be the only one stored, and two stored sides that differ are
not tied, whatever config.json says.
"""

import hashlib
from typing import TypeVar

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.notes import note
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.models import build_model
from barber_jax.models.family import Model

HEAD = "lm_head.weight"
"""Hugging Face name of a head that is not tied."""

Place = TypeVar("Place")


def settle_head(checkpoint: Checkpoint, places: dict[str, Place]) -> dict[str, Place]:
    """Make the configuration and the names of an opened checkpoint agree on the head.

    If the model is tied and both tensors are stored but differ, `checkpoint.config` becomes untied, and one line says
    so. If only the head is stored, it takes the embedding's name.

    Args:
        checkpoint: opened far enough that its `config` and `fetch` can be used.
        places: tensor name -> where it is stored.

    Returns:
        `places`, with the head under the embedding's name if there is no embedding.
    """
    if HEAD not in places:
        return places
    try:
        model = build_model(checkpoint.config, np.dtype(np.float32))
    except BarberError:
        # Said where the model is needed; a checkpoint may be opened for its tensors alone.
        return places
    if not model.tied_embedding:
        return places
    embedding = model.names.head["lm_head.kernel"]
    if embedding not in places:
        return {embedding if name == HEAD else name: place for name, place in places.items()}
    if _digest(checkpoint, HEAD) != _digest(checkpoint, embedding):
        note(f"{checkpoint.location}: config.json ties {HEAD} to {embedding}, but the two differ: both are used")
        checkpoint.config = {**checkpoint.config, "tie_word_embeddings": False}
    return places


def copies(checkpoint: Checkpoint, model: Model, name: str) -> list[str]:
    """Names under which a checkpoint stores the tensor `name` once more: a tied head beside its embedding.

    Whoever writes another value for the tensor must write it for them too; else head and embedding, which differ then,
    would no longer be tied.
    """
    tied = model.tied_embedding and name == model.names.head["lm_head.kernel"]
    return [HEAD] if tied and HEAD in checkpoint.names() else []


def _digest(checkpoint: Checkpoint, name: str) -> tuple:
    """Shape, dtype and a hash of the content: one of the two large tensors is in memory at a time."""
    dtype = checkpoint.dtype(name)
    content = np.ascontiguousarray(checkpoint.fetch(name)).view(np.uint8)
    return checkpoint.shape(name), dtype, hashlib.blake2b(content).digest()
