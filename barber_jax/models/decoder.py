"""Parts shared by all decoder families: the block interface, attention, activations, and blocks as pure functions.

Axis letters: S samples, L tokens, D hidden, F intermediate, H heads, K key-value heads, E head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Tap = Callable[[str, jax.Array], None]
"""Called with the name and value of an activation right before prunable linears read it."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclass
class BlockKVCache:
    """Key-value cache of one block's attention, for generation token by token.

    Attributes:
        position: int32 [S], position of the new token of each sequence; None while whole prompts are processed.
        keys, values: [S, T, K, E], with room for T positions; set by the attention that is given the cache.
    """

    position: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None

    def update(self, keys: jax.Array, values: jax.Array) -> None:
        """Store the keys and values of whole prompts [S, L, K, E], or of one new token per sequence [S, 1, K, E]."""
        if self.position is None:
            self.keys, self.values = keys, values
        else:
            rows = jnp.arange(len(self.position))
            self.keys = self.keys.at[rows, self.position].set(keys[:, 0])
            self.values = self.values.at[rows, self.position].set(values[:, 0])


MIN_CHUNK, MAX_CHUNKS = 128, 16
"""Attention processes queries in chunks of at least MIN_CHUNK, and at most MAX_CHUNKS chunks per sequence."""


@dataclass(frozen=True)
class SubBlock:
    """One self-attention or MLP sub-block, the unit of a rebuild.

    Attributes:
        name: the Flax submodule, `self_attn` or `mlp`.
        linears: (linear, input) pairs in the order of their flat indices in a `block` comparison group. `linear` is
            the path of the Flax module inside the block; linears that read the same activation share `input`.
        norm: name of the norm in the block that only this sub-block uses; empty if there is none.
    """

    name: str
    linears: tuple[tuple[str, str], ...]
    norm: str = ""

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
    leave(h, y) the hidden state after it. Pre-norm families normalise in `enter`, post-norm families in `leave`.
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
        own = (f"{sub.name}.", *([f"{sub.norm}."] if sub.norm else []))
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
        block = self.bind(parameters)
        for sub in self.sub_blocks:
            hidden = block.leave(sub.name, hidden, block.apply(sub.name, block.enter(sub.name, hidden), tap, cache))
        return hidden


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
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, rngs=rngs)


def rms_norm(size: int, epsilon: float, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with float32 statistics, output in `dtype`."""
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, rngs=rngs)


def layer_norm(size: int, affine: bool, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with PyTorch's epsilon and float32 statistics, output in `dtype`; scale and bias if `affine`."""
    # The fast variance, E[x^2] - E[x]^2, loses precision where the mean is large, as in OPT's outlier features.
    return nnx.LayerNorm(
        size, epsilon=1e-5, dtype=dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, rngs=rngs
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None = None, cache: BlockKVCache | None = None
) -> jax.Array:
    """Causal scaled dot-product attention with a float32 softmax.

    Queries are processed in chunks, each against only the keys that it can see: about half the multiplications of the
    full score matrix, and scores that fit in a CPU's cache.

    Args:
        q: [S, L, H, E]. k, v: [S, L, K, E], H a multiple of K.
        scale: factor on the scores.
        window: number of latest positions that a query sees, including its own; None for all.
        cache: stores k and v; during generation (L = 1), the query also sees the earlier positions in it.

    Returns:
        [S, L, H * E].
    """
    samples, length, heads, size = q.shape
    if cache is not None:
        cache.update(k, v)
        if cache.position is not None:
            return _attend_to_cache(q, cache, scale, window)
    groups = k.shape[2]
    # [S, K, G, L, E]: the G query heads that share a key-value head become one matrix against it.
    q = q.reshape(samples, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    chunk = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        oldest = 0 if window is None else max(0, first - window + 1)
        parts.append(_attend_chunk(q[..., first:last, :], k[:, :, oldest:last], v[:, :, oldest:last], scale, window))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(samples, length, -1)


def _attend_chunk(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None) -> jax.Array:
    """Attention of Q queries at the last of T positions: q [S, K, G, Q, E], k and v [S, K, T, E] -> [S, K, G, Q, E]."""
    samples, groups, shared, queries, size = q.shape
    keys = k.shape[2]
    batched = ((0, 1), (0, 1))
    rows = q.reshape(samples, groups, shared * queries, size)
    scores = lax.dot_general(rows, k, (((3,), (3,)), batched), preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(samples, groups, shared, queries, keys)
    distance = jnp.arange(keys - queries, keys)[:, None] - jnp.arange(keys)[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    mixed = lax.dot_general(weights.reshape(*rows.shape[:3], keys), v, (((3,), (2,)), batched))
    return mixed.reshape(q.shape)


def _attend_to_cache(q: jax.Array, cache: BlockKVCache, scale: float, window: int | None) -> jax.Array:
    """Attention of one new token per sequence, q [S, 1, H, E], to all positions in the cache -> [S, 1, H * E]."""
    samples, _, heads, size = q.shape
    keys, values = cache.keys.transpose(0, 2, 1, 3), cache.values.transpose(0, 2, 1, 3)
    grouped = q.reshape(samples, keys.shape[1], -1, size)
    scores = jnp.einsum("skgd,sktd->skgt", grouped, keys, preferred_element_type=jnp.float32) * scale
    distance = cache.position[:, None, None, None] - jnp.arange(keys.shape[2])
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("skgt,sktd->skgd", weights, values).reshape(samples, 1, heads * size)


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


class Decoder(nnx.Module):
    """A whole causal language model: embedding, blocks and head. For models that fit in memory as a whole."""

    def __init__(self, embed: nnx.Module, layers: list[Block], head: nnx.Module, sub_blocks: tuple[SubBlock, ...]):
        self.embed = embed
        self.layers = nnx.List(layers)
        self.head = head
        self.order = tuple(sub.name for sub in sub_blocks)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [S, L] token ids -> float32 [S, L, vocabulary] logits."""
        hidden = self.embed(ids)
        for block in self.layers:
            for sub in self.order:
                hidden = block.leave(sub, hidden, block.apply(sub, block.enter(sub, hidden)))
        return self.head(hidden).astype(jnp.float32)
