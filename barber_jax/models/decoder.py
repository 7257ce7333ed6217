"""Parts shared by all decoder families: the block interface, activations, and blocks as pure functions.

Axis letters: S samples, L tokens, D hidden, F intermediate, H heads, K key-value heads, E head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from barber_jax.models.attention import BlockKVCache

PRODUCT = "product"
"""Name for `jax.checkpoint` of what linears compute, before a bias."""

Tap = Callable[[str, jax.Array], None]
"""Called with the name and value of an activation right before prunable linears read it."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class SubBlock:
    """One self-attention or MLP sub-block, the unit of a rebuild.

    Attributes:
        name: the Flax submodule, `self_attn` or `mlp`.
        linears: (linear, input) pairs in the order of their flat indices in a `block` comparison group. `linear` is
            the path of the Flax module inside the block; linears that read the same activation share `input`.
        norms: names of the norms in the block that only this sub-block uses, before it and behind it.
        ends_in_linear: whether its output is that of its last linear; otherwise a norm follows.
    """

    name: str
    linears: tuple[tuple[str, str], ...]
    norms: tuple[str, ...] = ()
    ends_in_linear: bool = True

    @property
    def kernels(self) -> tuple[str, ...]:
        """Parameter paths of the prunable kernels, each [in, out]."""
        return tuple(f"{linear}.kernel" for linear, _ in self.linears)

    def splits_outputs(self, path: str) -> bool:
        """Whether a kernel is sharded by its outputs; otherwise it is sharded by its inputs.

        Linears that read the sub-block's own input are sharded by outputs, so those that read an intermediate
        activation are sharded by inputs.
        """
        return dict(self.linears)[path.removesuffix(".kernel")] == self.linears[0][1]


class Block(nnx.Module):
    """A decoder block that can be run one sub-block at a time.

    For a sub-block f and the hidden state h before it: x = enter(h) is the input of f, y = apply(x) its output, and
    leave(h, y) the hidden state after it. Pre-norm families normalise in `enter`, post-norm families in `leave`. A norm
    of what is added to the hidden state is part of f: it belongs in `apply`.
    """

    def enter(self, sub: str, hidden: jax.Array) -> jax.Array:
        """[S, L, D] hidden state -> [S, L, D] input of the sub-block."""
        raise NotImplementedError

    def apply(self, sub: str, x: jax.Array, tap: Tap | None = None, cache: BlockKVCache | None = None) -> jax.Array:
        """[S, L, D] input -> [S, L, D] output of the sub-block. Only attention uses `cache`."""
        tap = tap or (lambda name, value: None)
        module = getattr(self, sub)
        return module(x, tap) if cache is None or sub != "self_attn" else module(x, tap, cache)

    def leave(self, sub: str, hidden: jax.Array, y: jax.Array) -> jax.Array:
        """Residual connection: [S, L, D] hidden state before the sub-block and its output -> hidden state after it."""
        return hidden + y

    def run(
        self,
        sub_blocks: tuple[SubBlock, ...],
        hidden: jax.Array,
        tap: Tap | None = None,
        cache: BlockKVCache | None = None,
    ) -> jax.Array:
        """All sub-blocks, one after the other: [S, L, D] hidden state -> [S, L, D]."""
        for sub in sub_blocks:
            hidden = self.leave(sub.name, hidden, self.apply(sub.name, self.enter(sub.name, hidden), tap, cache))
        return hidden

    def norm_variance(self, residual: jax.Array) -> jax.Array:
        """Square of what the family's norm divides each token by: float32 [S, L, D] residual stream -> [S, L].

        Here the mean square, as in RMSNorm; a family with LayerNorm returns the variance.
        """
        return jnp.mean(jnp.square(residual), axis=-1)


@dataclass(frozen=True)
class Definition:
    """A Flax module without its parameters; hashable, so that it can be a static argument of jitted functions.

    Parameters are passed as a flat dict, such as `self_attn.q_proj.kernel` -> array.
    """

    graphdef: nnx.GraphDef
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def bind(self, parameters: dict[str, jax.Array]) -> nnx.Module:
        """The module with the given parameters, for use inside a traced function."""
        return nnx.merge(self.graphdef, nested(parameters))


@dataclass(frozen=True)
class BlockDefinition(Definition):
    """A decoder block without its parameters."""

    sub_blocks: tuple[SubBlock, ...]

    def paths(self, sub: SubBlock) -> tuple[str, ...]:
        """Paths of all parameters of a sub-block: its kernels, then its biases and norm."""
        own = (f"{sub.name}.", *(f"{norm}." for norm in sub.norms))
        rest = [path for path, _ in self.shapes if path.startswith(own) and path not in sub.kernels]
        return (*sub.kernels, *rest)

    def run(
        self,
        parameters: dict[str, jax.Array],
        hidden: jax.Array,
        tap: Tap | None = None,
        cache: BlockKVCache | None = None,
    ) -> jax.Array:
        """Run the whole block: [S, L, D] hidden state -> [S, L, D]."""
        return self.bind(parameters).run(self.sub_blocks, hidden, tap, cache)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a model without their parameters, for a scan over those, stacked: [N, ...], N blocks.

    Attributes:
        definitions: the distinct ones: one for each kind of block.
        kinds: index of each block's definition.
    """

    definitions: tuple[BlockDefinition, ...]
    kinds: tuple[int, ...]

    def __getitem__(self, index: int) -> BlockDefinition:
        """The definition of a block."""
        return self.definitions[self.kinds[index]]

    def scan(self, step: Callable[..., tuple[Any, Any]], carry: Any, each: Any) -> tuple[Any, Any]:
        """`lax.scan` of step(definition, carry, x) -> (carry, y) over the blocks. Each kind is compiled once.

        Args:
            each: pytree of what `step` gets as x, stacked: [N, ...].
        """
        if len(self.definitions) == 1:
            return lax.scan(partial(step, self.definitions[0]), carry, each)
        branches = [partial(step, definition) for definition in self.definitions]

        def of_kind(carry: Any, given: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            return lax.switch(given[0], branches, carry, given[1])

        return lax.scan(of_kind, carry, (jnp.asarray(self.kinds, jnp.int32), each))


def define(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Graph definition and parameter shapes of the module that `make` builds, without allocating it."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, tuple(
        (".".join(map(str, path)), leaf.get_value().shape) for path, leaf in nnx.to_flat_state(state)
    )


def nested(flat: dict[str, jax.Array]) -> dict:
    """Nest a flat dict: `{"a.b": x}` -> `{"a": {"b": x}}`. Numeric keys become ints, as Flax has them for lists."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[leaf] = value
    return tree


def linear(inputs: int, outputs: int, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with kernel [in, out] that computes in `dtype`."""
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, dot_general=_product_of_rows, rngs=rngs)


def _product_of_rows(x: jax.Array, kernel: jax.Array, dimensions: object, **options: Any) -> jax.Array:
    """`lax.dot_general` of [..., in] and [in, out], all tokens as the rows of one matrix.

    The product is the same. For the kernel's gradient of several axes of tokens, XLA transposes activations on a CPU,
    which took a third of the time of a block's gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return checkpoint_name(product.reshape(*x.shape[:-1], kernel.shape[1]), PRODUCT)


def rms_norm(size: int, epsilon: float, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with float32 statistics, output in `dtype`."""
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, rngs=rngs)


def layer_norm(size: int, affine: bool, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with PyTorch's epsilon and float32 statistics, output in `dtype`; scale and bias if `affine`."""
    # The fast variance, E[x^2] - E[x]^2, loses precision where the mean is large, as in OPT's outlier features.
    return nnx.LayerNorm(
        size, epsilon=1e-5, dtype=dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, rngs=rngs
    )


class GatedMLP(nnx.Module):
    """Gated MLP of the LLaMA families: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: str, bias: bool, dtype, rngs: nnx.Rngs):
        self.gate_proj = linear(hidden, intermediate, bias, dtype, rngs)
        self.up_proj = linear(hidden, intermediate, bias, dtype, rngs)
        self.down_proj = linear(intermediate, hidden, bias, dtype, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        tap("mlp.in", x)
        inner = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        tap("mlp.mid", inner)
        return self.down_proj(inner)


class Head(nnx.Module):
    """Final norm, or whatever a family has there, and the language-model head `lm_head`."""

    def final(self, hidden: jax.Array) -> jax.Array:
        """[S, L, D] hidden state after the last block -> [S, L, E], what the language-model head reads."""
        raise NotImplementedError

    def __call__(self, hidden: jax.Array, embedding: nnx.Embed | None = None) -> jax.Array:
        """[S, L, D] hidden state -> [S, L, vocabulary] logits, of a tied model with its embedding as the head."""
        final = self.final(hidden)
        return self.lm_head(final) if embedding is None else embedding.attend(final)


class Decoder(nnx.Module):
    """A whole causal language model: embedding, blocks and head. For models that fit in memory as a whole.

    Args:
        tied: whether the token embedding is the head too: it is one parameter then, and stays one in training.
        positions: maximum sequence length.

    Attributes:
        source: the checkpoint that it was loaded from, as the user gave it; empty if from none.
        settings: `Model.settings` of the model that made it; None if none has.
    """

    def __init__(
        self,
        embed: nnx.Module,
        layers: list[Block],
        head: Head,
        sub_blocks: tuple[SubBlock, ...],
        positions: int,
        tied: bool = False,
    ):
        self.embed = embed
        self.layers = nnx.List(layers)
        if tied:
            head.lm_head = None
        self.head = head
        self.sub_blocks = sub_blocks
        self.positions = positions
        self.tied = tied
        self.source = ""
        self.settings = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embed.embed_tokens.num_embeddings

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[S, L, D] hidden state after the last block -> float32 [S, L, vocabulary] logits."""
        return self.head(hidden, *([self.embed.embed_tokens] if self.tied else [])).astype(jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [S, L] token ids -> float32 [S, L, vocabulary] logits."""
        hidden = self.embed(ids)
        for block in self.layers:
            hidden = block.run(self.sub_blocks, hidden)
        return self.logits(hidden)
