"""What a model family must say of itself, and how configurations are read without guessing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx

from barber_jax.console.errors import BarberError
from barber_jax.models.decoder import ACTIVATIONS, Block, BlockDefinition, Decoder, Definition, SubBlock, define


@dataclass(frozen=True)
class Names:
    """The name table: Flax parameter path -> Hugging Face tensor name.

    A Flax `kernel` is [in, out], the tensor [out, in]; everything else has the tensor's own shape. Block entries
    hold `{i}` where the block's number goes. `ignored` are suffixes of tensors that carry no parameter.
    """

    embed: dict[str, str]
    block: dict[str, str]
    head: dict[str, str]
    ignored: tuple[str, ...] = ()

    def of_block(self, index: int) -> dict[str, str]:
        """The table of one block."""
        return {path: name.format(i=index) for path, name in self.block.items()}


@dataclass(frozen=True)
class Model:
    """One architecture at one size: everything the rest of the program asks of a model.

    Attributes:
        layers, vocabulary, hidden, positions: sizes; `positions` is the longest sequence it knows.
        sub_blocks: in execution order.
        names: the table, holding exactly the parameters that this configuration has.
        tied_embedding: the head's kernel is the token embedding.
        make_*: build the Flax modules; called under `nnx.eval_shape`.
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
    make_block: Callable[[nnx.Rngs], Block]
    make_head: Callable[[nnx.Rngs], nnx.Module]

    def embed(self) -> Definition:
        """Token ids [S, L] -> hidden [S, L, D]; given int32 [S] too, the positions of one token each (L = 1)."""
        return Definition(*define(lambda: self.make_embed(nnx.Rngs(0))))

    def block(self) -> BlockDefinition:
        """Hidden [S, L, D] -> hidden [S, L, D]; the same definition for every block."""
        return BlockDefinition(*define(lambda: self.make_block(nnx.Rngs(0))), self.sub_blocks)

    def head(self) -> Definition:
        """Hidden [S, L, D] -> logits [S, L, vocabulary]."""
        return Definition(*define(lambda: self.make_head(nnx.Rngs(0))))

    def decoder(self, rngs: nnx.Rngs) -> Decoder:
        """The whole model as one Flax module."""
        blocks = [self.make_block(rngs) for _ in range(self.layers)]
        return Decoder(self.make_embed(rngs), blocks, self.make_head(rngs), self.sub_blocks)

    def kernel_names(self, index: int) -> dict[str, str]:
        """Prunable kernels of a block: Flax path -> Hugging Face name, in order."""
        table = self.names.of_block(index)
        return {path: table[path] for sub in self.sub_blocks for path in sub.kernels}

    def pruned_names(self) -> list[str]:
        """Hugging Face names of every prunable weight, in order."""
        return [name for index in range(self.layers) for name in self.kernel_names(index).values()]


class HFConfig:
    """config.json read with care: a missing or odd entry is an error that names it."""

    def __init__(self, config: dict):
        self.raw = config

    def size(self, key: str, default: int | None = None, *, zero: bool = False) -> int:
        """A positive integer, or 0 if `zero`."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise BarberError(f"config.json: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < (not zero):
            wanted = "0 or a positive integer" if zero else "a positive integer"
            raise BarberError(f"config.json: {key} must be {wanted}, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value = self.raw.get(key, default)
        # Compared before it becomes a float, which an integer may be too large for; NaN fails too.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
            raise BarberError(f"config.json: {key} must be a finite number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise BarberError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """An activation that we have."""
        value = self.raw.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise BarberError(
                f"config.json: activation {value!r} ({key}) is not supported (known: {', '.join(ACTIVATIONS)})"
            )
        return value

    def multiple(self, whole: str, of: str, whole_size: int, of_size: int) -> None:
        """Require that one size is a multiple of another."""
        if whole_size % of_size:
            raise BarberError(f"config.json: {whole} {whole_size} is not a multiple of {of} {of_size}")
