"""Generation of tokens with a key-value cache, greedily or sampled: for models of any kind, and for a `Decoder`.

Axis letters: B sequences, L tokens of a prompt, T positions of the cache, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from barber_jax.console.errors import BarberError
from barber_jax.forward.passes import not_finite
from barber_jax.models.attention import BlockKVCache
from barber_jax.models.decoder import Decoder
from barber_jax.models.sharding import DATA, constrain

CHECK_INTERVAL = 32
"""Tokens generated between two checks whether all sequences have ended."""

SPAN = 256
"""Tokens of the vocabulary in a span, of which one is drawn first."""

NO_TOKEN = -1
"""Stands for the token that logits with NaN or Inf do not give."""

KVCache = Any
"""Keys [B, K, E, T] and values [B, K, T, E] of all blocks, a pair for each block, or stacked [blocks, ...]."""

RunBlock = Callable[[Callable[..., jax.Array], jax.Array, Any], tuple[jax.Array, Any]]
"""Called with a block, the hidden states before it and its part of the cache; returns both as they are after it."""


class Network(NamedTuple):
    """A model inside a traced function.

    Attributes:
        embed: int32 [B, L] token ids, and int32 [B] positions if L = 1 -> hidden states [B, L, D].
        run_blocks: called with hidden states, a `RunBlock` and the cache (None at first); applies the first to all
            blocks in order. A block is a function of hidden states and of a `BlockKVCache` named `cache`.
        head: hidden states [B, L, D] -> logits [B, L, V].
    """

    embed: Callable[..., jax.Array]
    run_blocks: Callable[[jax.Array, RunBlock, KVCache | None], tuple[jax.Array, KVCache]]
    head: Callable[[jax.Array], jax.Array]


MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-20, 1e20
"""Divided by a number beyond these, logits would not be finite in float32, or all be 0."""


class Sampling(NamedTuple):
    """How tokens are drawn from the model's distribution.

    Sequence n of a seed is drawn in the same way whatever batch it is in, on however many devices.

    Attributes:
        temperature: divides the logits; above 0.
        seed: from 0 to 2**32 - 1.
        rows: int32 [B], the number n of each sequence.
    """

    temperature: Any
    seed: Any
    rows: Any

    @classmethod
    def of(cls, temperature: float, seed: int, rows: np.ndarray) -> "Sampling | None":
        """Check the values; None for temperature 0, that is, for the most likely token each time.

        Raises:
            BarberError: a value is out of range.
        """
        # Logits are divided by it in float32.
        if not _is_number(temperature) or (temperature and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
            raise BarberError(
                f"temperature {temperature} is not 0 (greedy) nor a number from {MIN_TEMPERATURE:g} to "
                f"{MAX_TEMPERATURE:g}"
            )
        if not _is_integer(seed) or not 0 <= seed < 2**32:
            raise BarberError(f"seed {seed} is not from 0 to 2**32 - 1")
        if temperature == 0:
            return None
        return cls(np.float32(temperature), np.uint32(seed), np.asarray(rows, np.int32))


def choose(logits: jax.Array, position: jax.Array, sampling: Sampling | None) -> jax.Array:
    """The token at a position of each sequence, int32 [B], given its logits [B, V]; `NO_TOKEN` if one is not finite."""
    logits = logits.astype(jnp.float32)
    finite = jnp.isfinite(logits).all(axis=-1)
    if sampling is None:
        return jnp.where(finite, jnp.argmax(logits, axis=-1), NO_TOKEN).astype(jnp.int32)

    def uniform(row: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
        return jax.random.uniform(key, (2,))

    # Two random numbers, not one for each token of the vocabulary: on a CPU those would take as long as the model.
    # First a span of the vocabulary is drawn, then a token in it.
    weights = jnp.exp((logits - jnp.max(logits, axis=1, keepdims=True)) / sampling.temperature)
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % SPAN))).reshape(len(weights), -1, SPAN)
    draws = jax.vmap(uniform)(sampling.rows, position)
    span = _draw(jnp.sum(weights, axis=2), draws[:, 0])
    inside = jnp.take_along_axis(weights, span[:, None, None], axis=1)[:, 0]
    return jnp.where(finite, SPAN * span + _draw(inside, draws[:, 1]), NO_TOKEN)


def _draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draw an entry of each row with probability proportional to its weight: [B, N], uniform [B] -> int32 [B]."""
    sums = jnp.cumsum(weights, axis=1)
    total = sums[:, -1]
    # Below the total also where the product is rounded up to it, so that no entry of weight 0 is drawn.
    goal = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(sums > goal[:, None], axis=1).astype(jnp.int32)


def extended(keys: jax.Array, values: jax.Array, more: int) -> tuple[jax.Array, jax.Array]:
    """Keys [..., E, T] and values [..., T, E] of a block with room for so many more positions."""
    before = ((0, 0),) * (keys.ndim - 2)
    return jnp.pad(keys, (*before, (0, 0), (0, more))), jnp.pad(values, (*before, (0, more), (0, 0)))


def prefill(
    network: Network, ids: jax.Array, lengths: jax.Array, sampling: Sampling | None, capacity: int
) -> tuple[jax.Array, KVCache]:
    """Process prompts and fill the key-value cache. To be traced.

    Args:
        ids: int32 [B, L] prompts, padded on the right.
        lengths: int32 [B], lengths of the prompts without padding.
        capacity: T, positions that the cache has room for.

    Returns:
        The next token of each prompt, int32 [B], and the cache.
    """
    more = capacity - ids.shape[1]

    def each(block: Callable[..., jax.Array], hidden: jax.Array, _: None) -> tuple[jax.Array, Any]:
        cache = BlockKVCache()
        hidden = block(hidden, cache=cache)
        return constrain(hidden, DATA), extended(cache.keys, cache.values, more)

    hidden, cache = network.run_blocks(constrain(network.embed(ids), DATA), each, None)
    final = hidden[jnp.arange(len(ids)), lengths - 1]
    return constrain(choose(network.head(final[:, None])[:, 0], lengths, sampling)), cache


def decode(
    network: Network,
    token: jax.Array,
    position: jax.Array,
    sampling: Sampling | None,
    cache: KVCache,
    steps: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Append `steps` tokens to each sequence. To be traced.

    Args:
        token, position: int32 [B], the first token to append to each sequence, and its position.

    Returns:
        The appended tokens int32 [B, steps], which begin with `token`; the next token [B]; and the cache.
    """

    def append(carry: tuple[jax.Array, jax.Array, KVCache], _: None) -> tuple[Any, jax.Array]:
        token, position, cache = carry

        def each(block: Callable[..., jax.Array], hidden: jax.Array, kept: Any) -> tuple[jax.Array, Any]:
            own = BlockKVCache(position, *kept)
            hidden = block(hidden, cache=own)
            return hidden, (own.keys, own.values)

        hidden, cache = network.run_blocks(network.embed(token[:, None], position), each, cache)
        following = choose(network.head(hidden)[:, 0], position + 1, sampling)
        return (following, position + 1, cache), token

    (token, _, cache), tokens = lax.scan(append, (token, position, cache), None, length=steps)
    return constrain(tokens.T), constrain(token), cache


def run(
    prefill: Callable[..., tuple[jax.Array, KVCache]],
    decode: Callable[..., tuple[jax.Array, jax.Array, KVCache]],
    ids: jax.Array,
    lengths: jax.Array,
    tokens: int,
    steps: int,
    stop: Callable[[np.ndarray], bool],
    sampling: Sampling | None,
) -> np.ndarray:
    """Continue prompts until `stop` says so, or at most by `tokens` tokens.

    Args:
        prefill, decode: the functions of this name, jitted, with the network filled in.
        steps: tokens generated between two calls of `stop`, which gets all so far, int32 [B, n].

    Returns:
        Generated tokens int32 [B, n], n a multiple of `steps`; those after the first `tokens` mean nothing.

    Raises:
        BarberError: logits are not finite.
    """
    rounds = -(-tokens // steps)
    token, cache = prefill(ids, lengths, sampling, capacity=ids.shape[1] + rounds * steps)
    generated = []
    for begin in range(0, rounds * steps, steps):
        more, token, cache = decode(token, lengths + begin, sampling, cache=cache, steps=steps)
        generated.append(np.asarray(more))
        # Tokens that nobody asked for may be behind the model's last position.
        check_tokens(generated[-1][:, : tokens - begin])
        if stop(np.concatenate(generated, axis=1)):
            break
    return np.concatenate(generated, axis=1)


def check_tokens(tokens: np.ndarray) -> None:
    """Raise BarberError if there is a `NO_TOKEN` among generated tokens."""
    if (tokens == NO_TOKEN).any():
        raise not_finite()


def _array(values: Any) -> np.ndarray:
    """As an array; what is none, rows of several lengths, becomes an array without an integer dtype."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray(None)


def _is_integer(value: Any) -> bool:
    """Whether a number, or an array, is of integers."""
    # By its kind: NumPy counts timedelta64 among the integer types.
    return not isinstance(value, str) and np.asarray(value).dtype.kind in "iu"


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf"


def _network(model: Decoder) -> Network:
    """A decoder for generation; its blocks are not stacked."""

    def run_blocks(hidden: jax.Array, each: RunBlock, caches: KVCache | None) -> tuple[jax.Array, KVCache]:
        kept = []
        for block, cache in zip(model.layers, caches or [None] * len(model.layers), strict=True):
            hidden, after = each(functools.partial(block.run, model.sub_blocks), hidden, cache)
            kept.append(after)
        return hidden, kept

    return Network(model.embed, run_blocks, model.logits)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _prefill(graph: nnx.GraphDef, state: Any, *arguments, capacity: int) -> tuple[jax.Array, KVCache]:
    return prefill(_network(nnx.merge(graph, state)), *arguments, capacity)


@functools.partial(jax.jit, static_argnames=("graph", "steps"), donate_argnames="cache")
def _decode(
    graph: nnx.GraphDef, state: Any, *arguments, cache: KVCache, steps: int
) -> tuple[jax.Array, jax.Array, KVCache]:
    return decode(_network(nnx.merge(graph, state)), *arguments, cache, steps)


def generate(
    model: Decoder,
    ids: Any,
    lengths: Any = None,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    end: int | None = None,
) -> np.ndarray:
    """Continue prompts with a model from `barber_jax.load`.

    Args:
        model: computes in the dtype that it was loaded with.
        ids: int [S, L] token ids of the prompts, the shorter ones padded on the right with any token.
        lengths: int [S], the prompts' lengths without padding, at least 1; None if there is no padding.
        tokens: number of tokens to generate for each prompt.
        temperature: 0 takes the most likely token each time; above, tokens are drawn from the distribution that the
            logits divided by it give.
        seed: of the draws. Prompt n of a seed is continued in the same way whatever other prompts are there.
        end: token after which a continuation has ended: what follows it is `end` too, and generation stops early when
            all have ended.

    Returns:
        int32 [S, tokens], the continuations without their prompts.

    Raises:
        BarberError: the prompts do not fit the model, prompt and continuation are longer than its positions, or the
            model's logits are not finite.
    """
    ids = _array(ids)
    if ids.ndim != 2 or not _is_integer(ids) or not ids.size:
        raise BarberError(f"prompts are token ids [S, L], not {ids.dtype} of shape {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= model.vocabulary:
        raise BarberError(f"prompts hold token {ids.min()} or {ids.max()}; the model has {model.vocabulary} tokens")
    lengths = np.full(len(ids), ids.shape[1]) if lengths is None else _array(lengths)
    fit = lengths.shape == ids.shape[:1] and _is_integer(lengths)
    if not fit or not ((lengths >= 1) & (lengths <= ids.shape[1])).all():
        raise BarberError(f"lengths must be {len(ids)} numbers from 1 to {ids.shape[1]}, one for each prompt")
    if not _is_integer(tokens):
        raise BarberError(f"tokens {tokens!r} is not a number of tokens")
    if end is not None and not (_is_integer(end) and 0 <= end < model.vocabulary):
        raise BarberError(f"end {end!r} is not one of the model's {model.vocabulary} tokens")
    if tokens < 1 or lengths.max() + tokens > model.positions:
        raise BarberError(
            f"{tokens} tokens after prompts of up to {lengths.max()}: the model has {model.positions} positions"
        )
    # Padding that all have is not computed, and may be beyond the model's positions.
    ids = ids[:, : lengths.max()]
    sampling = Sampling.of(temperature, seed, np.arange(len(ids)))
    graph, state = nnx.split(model)
    made = run(
        functools.partial(_prefill, graph, state),
        functools.partial(_decode, graph, state),
        *(jnp.asarray(given, jnp.int32) for given in (ids, lengths)),
        tokens,
        tokens if end is None else min(tokens, CHECK_INTERVAL),
        lambda made: end is not None and bool((made == end).any(axis=1).all()),
        sampling,
    )
    if end is None:
        return made
    made = np.pad(made, ((0, 0), (0, max(0, tokens - made.shape[1]))), constant_values=end)[:, :tokens]
    ended = np.cumsum(made == end, axis=1) > 0
    return np.where(ended, np.int32(end), made)
