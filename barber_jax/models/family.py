"""Describes a model family to the rest of the program, and reads the entries of config.json strictly."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flax import nnx

from barber_jax.console.errors import BarberError
from barber_jax.models.decoder import (
    ACTIVATIONS,
    Block,
    BlockDefinition,
    BlockStack,
    Decoder,
    Definition,
    Head,
    SubBlock,
    define,
)
from barber_jax.models.numbers import positive

MAX_SIZE = 2**31 - 1
"""Largest size in config.json: products of two fit 64 bits, and conversions to float do not overflow."""


@dataclass(frozen=True)
class Names:
    """Name table: Flax parameter path -> Hugging Face tensor name.

    A Flax `kernel` is [in, out] and its tensor [out, in]; all other parameters have the tensor's shape. Names in
    `block` contain `{i}` for the block's index. `ignored` are name suffixes of tensors that are not parameters;
    `carried` are name prefixes of those of other parts of the checkpoint, which are only copied.
    """

    embed: dict[str, str]
    block: dict[str, str]
    head: dict[str, str]
    ignored: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    def of_block(self, index: int) -> dict[str, str]:
        """The name table of block `index`."""
        return {path: name.format(i=index) for path, name in self.block.items()}


@dataclass(frozen=True)
class Model:
    """One architecture at one size: everything that the rest of the program needs to know of a model.

    Attributes:
        layers, vocabulary, hidden, positions: sizes; `positions` is the maximum sequence length.
        sub_blocks: in execution order.
        names: name table of exactly the parameters that this configuration has.
        tied_embedding: whether the head's kernel is the token embedding.
        begins: whether the model relies on a begin token in front of every sequence.
        make_*: build the Flax modules; `make_block` that of a block of the given kind.
        settings: the family's own configuration, a frozen dataclass; with `model_type` all that the model computes
            depends on, but for its dtype.
        kind: index of a block -> its kind. Blocks of several kinds have parameters of the same names and shapes, but
            compute differently.
    """

    model_type: str
    layers: int
    vocabulary: int
    hidden: int
    positions: int
    sub_blocks: tuple[SubBlock, ...]
    names: Names
    tied_embedding: bool
    make_embed: Callable[[nnx.Rngs], nnx.Module]
    make_block: Callable[[nnx.Rngs, str], Block]
    make_head: Callable[[nnx.Rngs], Head]
    settings: Any
    kind: Callable[[int], str] = lambda index: ""
    begins: bool = False

    def embed(self) -> Definition:
        """Embedding, token ids [S, L] (with L = 1 also their positions, int32 [S]) -> hidden [S, L, D]."""
        return Definition(*define(lambda: self.make_embed(nnx.Rngs(0))))

    def block(self, index: int = 0) -> BlockDefinition:
        """A decoder block, hidden [S, L, D] -> hidden [S, L, D]; equal for all blocks of one kind."""
        return self._define(self.kind(index))

    def blocks(self) -> BlockStack:
        """All decoder blocks."""
        kinds = [self.kind(index) for index in range(self.layers)]
        distinct = list(dict.fromkeys(kinds))
        return BlockStack(tuple(map(self._define, distinct)), tuple(map(distinct.index, kinds)))

    def _define(self, kind: str) -> BlockDefinition:
        return BlockDefinition(*define(lambda: self.make_block(nnx.Rngs(0), kind)), self.sub_blocks)

    def head(self) -> Definition:
        """Head, hidden [S, L, D] -> logits [S, L, vocabulary]."""
        return Definition(*define(lambda: self.make_head(nnx.Rngs(0))))

    def decoder(self, rngs: nnx.Rngs) -> Decoder:
        """Build the whole model as one Flax module; if it is tied, its head has no parameter of its own."""
        blocks = [self.make_block(rngs, self.kind(index)) for index in range(self.layers)]
        parts = (self.make_embed(rngs), blocks, self.make_head(rngs))
        decoder = Decoder(*parts, self.sub_blocks, self.positions, self.tied_embedding)
        decoder.settings = self.settings
        return decoder

    def check_length(self, length: int) -> None:
        """Raise BarberError if sequences of `length` tokens are longer than the model's positions."""
        if length > self.positions:
            raise BarberError(f"--length {length} is more than the model's {self.positions} positions")

    def kernel_names(self, index: int) -> dict[str, str]:
        """Prunable kernels of a block: Flax path -> Hugging Face name, in order."""
        table = self.names.of_block(index)
        return {path: table[path] for sub in self.sub_blocks for path in sub.kernels}

    def pruned_names(self) -> list[str]:
        """Hugging Face names of all prunable weights, in order."""
        return [name for index in range(self.layers) for name in self.kernel_names(index).values()]


def first_difference(ours: Any, theirs: Any, but: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """The first setting in which two models compute differently: its name, `ours` and `theirs`; None for none.

    Weights of one model in the other would fit, and silently give another model.

    Args:
        ours, theirs: `Model.settings` of two models.
        but: settings that are not compared. `positions` never is: it is a limit, and where it is a size too (OPT), the
            shapes of tensors tell.
    """
    if type(ours) is not type(theirs):
        return "family", type(ours).__name__, type(theirs).__name__
    for field in dataclasses.fields(ours):
        if field.name in ("positions", *but):
            continue
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if one != other:
            inner = dataclasses.is_dataclass(one) and first_difference(one, other)
            return (f"{field.name} {inner[0]}", *inner[1:]) if inner else (field.name, one, other)
    return None


class HFConfig:
    """Strict access to config.json: a missing or invalid entry raises a BarberError that names it."""

    def __init__(self, config: dict):
        self.raw = config

    def size(self, key: str, default: int | None = None, *, zero: bool = False) -> int:
        """A positive integer; also 0 if `zero`."""
        value = self._given(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not (not zero) <= value <= MAX_SIZE:
            wanted = ("0 or a positive integer" if zero else "a positive integer") + f" up to {MAX_SIZE}"
            raise BarberError(f"config.json: {key} must be {wanted}, not {value!r}")
        return value

    def window(self, key: str = "sliding_window") -> int:
        """A number of positions; all beyond int32, in which positions are compared, mean the same."""
        value = self._given(key)
        return MAX_SIZE if type(value) is int and value > MAX_SIZE else self.size(key)

    def _given(self, key: str, default: int | None = None) -> Any:
        """An entry, or the default where it is missing or null; there must be one of them."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise BarberError(f"config.json: {key} is missing")
        return value

    def norm_epsilon(self, key: str, default: float) -> float:
        """The constant that an RMSNorm adds to the mean square, a number above 0 and at most 1.

        A larger one would drown the mean square: the norm's output, and with it the block's, would vanish.
        """
        return positive(key, self.raw.get(key, default), most=1.0)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise BarberError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """The name of a supported activation."""
        value = self.raw.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise BarberError(
                f"config.json: activation {value!r} ({key}) is not supported (known: {', '.join(ACTIVATIONS)})"
            )
        return value

    def require_multiple(self, whole: str, of: str, whole_size: int, of_size: int) -> None:
        """Raise BarberError unless one size is a multiple of another."""
        if whole_size % of_size:
            raise BarberError(f"config.json: {whole} {whole_size} is not a multiple of {of} {of_size}")
