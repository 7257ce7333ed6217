"""Converts between Hugging Face tensors and Flax parameters, using a family's name table."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.tied_head import HEAD
from barber_jax.models import build_model, plain_config
from barber_jax.models.decoder import Definition
from barber_jax.models.family import Model, first_difference


def to_flax(path: str, tensor: np.ndarray) -> np.ndarray:
    """Convert a Hugging Face tensor to Flax layout: the tensor [out, in] of a kernel becomes [in, out]."""
    return tensor.T if path.endswith(".kernel") else tensor


def to_hf(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax`."""
    return value.T if path.endswith(".kernel") else value


def read_parameters(checkpoint: Checkpoint, table: dict[str, str]) -> dict[str, np.ndarray]:
    """Read the parameters of one part of a model: Flax path -> array in the checkpoint's dtype.

    Args:
        checkpoint: where to read from.
        table: Flax path -> Hugging Face name.

    Raises:
        BarberError: a tensor is damaged, or contains NaN or Inf.
    """
    return {path: to_flax(path, checkpoint.read(name)) for path, name in table.items()}


def tree_paths(model: Model) -> Iterator[tuple[str, str]]:
    """Yield (path in the `Decoder`'s tree, Hugging Face name) of every stored parameter, in model order."""
    embed = model.names.embed
    yield from ((f"embed.{path}", name) for path, name in embed.items())
    for index in range(model.layers):
        yield from ((f"layers.{index}.{path}", name) for path, name in model.names.of_block(index).items())
    # A tied head has the Hugging Face name of the embedding and is not stored.
    yield from ((f"head.{path}", name) for path, name in model.names.head.items() if name not in embed.values())


def read_stacked(checkpoint: Checkpoint, model: Model, path: str) -> np.ndarray:
    """Read one parameter of all blocks: [N, ...] in the checkpoint's dtype, N blocks.

    Raises:
        BarberError: as `read_parameters`.
    """
    tables = ({path: model.names.of_block(index)[path]} for index in range(model.layers))
    return np.stack([read_parameters(checkpoint, table)[path] for table in tables])


def check_tensors(checkpoint: Checkpoint, model: Model) -> None:
    """Check the names, shapes and dtypes of a checkpoint's tensors against the model, before any tensor is read.

    Raises:
        BarberError: a tensor is missing, has the wrong shape or dtype, or does not belong to the model.
    """
    present = set(checkpoint.names())
    expected: set[str] = set()
    # One part at a time: a wrong number of layers must fail at the first missing tensor, not list billions of names.
    for definition, table in _parts(model):
        for path, shape in definition.shapes:
            name = table[path]
            if name not in present:
                raise BarberError(
                    f"{checkpoint.location}: tensor {name} is missing; {_remedy(name, checkpoint, model)}"
                )
            _check_shape(checkpoint, name, tuple(reversed(shape)) if path.endswith(".kernel") else shape)
            checkpoint.dtype(name)
            expected.add(name)
    # A head stored along with a tied embedding is a copy of it (`tied_head`).
    known = expected | ({HEAD} if model.tied_embedding else set())
    for name in sorted(present - known):
        if not name.endswith(model.names.ignored) and not name.startswith(model.names.carried):
            raise BarberError(
                f"{checkpoint.location}: tensor {name} does not belong to the {model.model_type} model in config.json"
            )


def check_names_and_shapes(
    given: dict[str, tuple[int, ...]], names: Sequence[str], checkpoint: Checkpoint, what: str
) -> None:
    """Raise `BarberError` unless the given tensors have the names `names` and their shapes in the checkpoint.

    Args:
        given: name -> shape of the tensors to check.
        names: names that are required.
        what: beginning of the error message.
    """
    required = {name: checkpoint.shape(name) for name in names}
    for name in sorted(required.keys() ^ given.keys()):
        problem = "is missing" if name in required else "is unexpected"
        raise BarberError(f"{what} {name} {problem}; it must be of the same model as {checkpoint.location}")
    for name, shape in required.items():
        if given[name] != shape:
            raise BarberError(f"{what} {name} has shape {list(given[name])}, in {checkpoint.location} {list(shape)}")


def check_same_settings(model: Model, of: str, checkpoint: Checkpoint, remedy: str, but: Collection[str] = ()) -> None:
    """Raise `BarberError` if the configuration of a second checkpoint of a model computes something else.

    Args:
        model: the model.
        of: where its configuration is from, for the message.
        checkpoint: the second checkpoint, whose tensors are used in `model`.
        remedy: end of the message.
        but: settings that may differ (`first_difference`). A head and an embedding that are tied in the second
            checkpoint alone are read as two equal matrices.
    """
    try:
        other = build_model(checkpoint.config, np.dtype(np.float32))
    except BarberError as error:
        raise BarberError(f"{checkpoint.location}: {error}") from None
    but = {*but, *(["tied"] if other.tied_embedding else [])}
    differs = first_difference(model.settings, other.settings, but)
    if differs:
        what, ours, theirs = differs
        raise BarberError(
            f"{checkpoint.location}: its {what} (config.json) is {theirs}, that of {of} is {ours}; {remedy}"
        )


def _remedy(name: str, checkpoint: Checkpoint, model: Model) -> str:
    present = set(checkpoint.names())
    listed = checkpoint.config.get("architectures") or []
    base = next((each for each in listed if each.lower().endswith("model")), None)
    if name == HEAD and base:
        (whole,) = plain_config(checkpoint.config)["architectures"]
        return f"it was saved from the base model ({base}), which has no head: save it from {whole}"
    module = name.rpartition(".")[0]
    if any(each.startswith(f"{module}.parametrizations.") for each in present):
        return (
            "it is parametrized (torch.nn.utils.parametrize): save the model again after squash_mask() of its "
            "sparsifier, or remove_parametrizations"
        )
    if {f"{name}_g", f"{name}_v"} & present:
        return "it is split by torch.nn.utils.weight_norm: save the model again after remove_weight_norm"
    if any(each.endswith(f".{name}") for each in present):
        return "its tensors have names with something in front; save the model itself, not what it is part of"
    pair = {model.names.embed["embed_tokens.embedding"], HEAD}
    if name in pair and pair & present:
        (other,) = pair - {name}
        return f"fetch the checkpoint again or, if {other} is both, set tie_word_embeddings to true in config.json"
    return "fetch the checkpoint again or fix config.json"


def _parts(model: Model) -> Iterator[tuple[Definition, dict[str, str]]]:
    """Yield the embedding, the head and every block, each with its name table."""
    yield model.embed(), model.names.embed
    yield model.head(), model.names.head
    block = model.block()
    for index in range(model.layers):
        yield block, model.names.of_block(index)


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    given = checkpoint.shape(name)
    if 0 in given:
        raise BarberError(
            f"{checkpoint.location}: tensor {name} is empty (shape {list(given)}), as DeepSpeed's ZeRO-3 saves what is "
            "spread over processes; make whole weights with zero_to_fp32.py from the training checkpoint, or save "
            "again with stage3_gather_16bit_weights_on_model_save"
        )
    if given != shape:
        raise BarberError(
            f"{checkpoint.location}: tensor {name} has shape {list(given)}, config.json asks for {list(shape)}; "
            "fetch both again from one place"
        )
