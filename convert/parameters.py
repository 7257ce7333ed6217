"""Between Hugging Face tensors and Flax parameters, by a family's name table."""

import numpy as np

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.errors import BarberError
from barber_jax.models.family import Model


def to_flax(path: str, tensor: np.ndarray) -> np.ndarray:
    """A Hugging Face tensor in Flax layout: a kernel is [in, out], its tensor [out, in]."""
    return tensor.T if path.endswith(".kernel") else tensor


def to_hf(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax`."""
    return value.T if path.endswith(".kernel") else value


def read_parameters(checkpoint: Checkpoint, table: dict[str, str]) -> dict[str, np.ndarray]:
    """Read one part of a model: Flax path -> array in the checkpoint's dtype.

    Raises:
        BarberError: a tensor is damaged, or holds NaN or Inf.
    """
    return {path: to_flax(path, checkpoint.read(name)) for path, name in table.items()}


def check_tensors(checkpoint: Checkpoint, model: Model) -> None:
    """Compare names and shapes with what the configuration asks for, before any tensor is read.

    Raises:
        BarberError: a tensor is missing, has the wrong shape or dtype, or has no place in the model.
    """
    expected: dict[str, tuple[int, ...]] = {}

    def add(definition, table):
        for path, shape in definition.shapes:
            expected[table[path]] = tuple(reversed(shape)) if path.endswith(".kernel") else shape

    block = model.block()
    add(model.embed(), model.names.embed)
    add(model.head(), model.names.head)
    for index in range(model.layers):
        add(block, model.names.of_block(index))
    present = set(checkpoint.names())
    for name, shape in expected.items():
        if name not in present:
            raise BarberError(f"{checkpoint.location}: tensor {name} is missing")
        if checkpoint.shape(name) != shape:
            given = list(checkpoint.shape(name))
            raise BarberError(
                f"{checkpoint.location}: tensor {name} has shape {given}, config.json asks for {list(shape)}"
            )
        checkpoint.dtype(name)
    # A head stored beside a tied embedding is the embedding's copy; Hugging Face ignores it too.
    known = set(expected) | ({"lm_head.weight"} if model.tied_embedding else set())
    for name in sorted(present - known):
        if not name.endswith(model.names.ignored):
            raise BarberError(
                f"{checkpoint.location}: tensor {name} has no place in a {model.model_type} of this config.json"
            )
