"""Causal scaled dot-product attention, exact, in the form that is fastest on the platform.

Axis letters: S samples, L tokens, H heads, K key-value heads, G = H / K, E head size, Q queries, T positions.

| platform | what is used |
|---|---|
| CPU | chunks of queries, each against the keys that it can see alone: half the work, and scores that fit its caches |
| GPU, bfloat16 | cuDNN's fused attention; with heads up to 128 and scores without a bound |
| otherwise | equal chunks of queries against all keys, in a loop: a small program, no scores kept for the gradient |
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

MIN_CHUNK, MAX_CHUNKS = 128, 16
"""On a CPU: queries in a chunk at least, and chunks of a sequence at most."""
LOOP_CHUNK = 512
"""Elsewhere: queries in a chunk."""


@dataclass
class BlockKVCache:
    """Key-value cache of one block's attention, for generation token by token.

    Attributes:
        position: int32 [S], position of the new token of each sequence; None while whole prompts are processed.
        keys: [S, K, E, T], with room for T positions; set by the attention that is given the cache, as are
        values: [S, K, T, E].
    """

    position: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None

    def update(self, keys: jax.Array, values: jax.Array) -> None:
        """Store the keys and values of whole prompts [S, L, K, E], or of one new token per sequence [S, 1, K, E]."""
        if self.position is None:
            self.keys, self.values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
        else:
            rows = jnp.arange(len(self.position))
            self.keys = self.keys.at[rows, :, :, self.position].set(keys[:, 0])
            self.values = self.values.at[rows, :, self.position].set(values[:, 0])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    window: int | None = None,
    cache: BlockKVCache | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Causal scaled dot-product attention with a float32 softmax.

    Args:
        q: [S, L, H, E]. k, v: [S, L, K, E], H a multiple of K.
        scale: factor on the scores.
        window: number of latest positions that a query sees, including its own; None for all.
        cap: bound of the scores: each becomes cap tanh(score / cap); None for none.
        cache: stores k and v; during generation (L = 1), the query also sees the earlier positions in it.

    Returns:
        [S, L, H * E].
    """
    if cache is not None:
        cache.update(k, v)
        if cache.position is not None:
            return _attend_to_cache(q, cache, scale, window, cap)
    platform = jax.default_backend()
    if platform == "cpu":
        return attend_in_spans(q, k, v, scale, window, cap)
    if platform == "gpu" and q.dtype == jnp.bfloat16 and fits_cudnn(q.shape[-1]) and cap is None:
        return attend_with_cudnn(q, k, v, scale, window)
    return attend_in_loop(q, k, v, scale, window, cap)


def fits_cudnn(size: int) -> bool:
    """Whether cuDNN's fused attention takes heads of this size, forward and backward, on every GPU that has it."""
    return size % 8 == 0 and size <= 128


def attend_with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None = None) -> jax.Array:
    """`attend` by cuDNN, which wants 16-bit numbers."""
    # cuDNN counts the positions to the left of the query's own.
    sides = None if window is None else (window - 1, 0)
    mixed = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=sides, implementation="cudnn"
    )
    return mixed.reshape(*q.shape[:2], -1)


def attend_in_spans(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None = None, cap: float | None = None
) -> jax.Array:
    """`attend` by chunks of queries, each against only the span of keys that it can see."""
    length = q.shape[1]
    q, k, v = _heads_first(q, k, v)
    chunk = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        oldest = 0 if window is None else max(0, first - window + 1)
        span = slice(oldest, last)
        arguments = (q[..., first:last, :], k[:, :, span], v[:, :, span], first - oldest, scale, window, cap)
        parts.append(_attend_chunk(*arguments))
    return _heads_last(jnp.concatenate(parts, axis=3))


def attend_in_loop(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None = None, cap: float | None = None
) -> jax.Array:
    """`attend` by chunks of queries of one size, each against all keys; the gradient computes the scores again."""
    length = q.shape[1]
    q, k, v = _heads_first(q, k, v)
    chunk = min(LOOP_CHUNK, length)
    chunks = -(-length // chunk)
    # The last chunk may reach beyond the sequence; what comes of that is cut off.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, chunks * chunk - length), (0, 0)))
    queries = jnp.moveaxis(q.reshape(*q.shape[:3], chunks, chunk, q.shape[-1]), 3, 0)

    @jax.checkpoint
    def one(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend_chunk(given[0], k, v, given[1], scale, window, cap)

    mixed = jnp.moveaxis(lax.map(one, (queries, chunk * jnp.arange(chunks))), 0, 3)
    return _heads_last(mixed.reshape(*q.shape)[..., :length, :])


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [S, K, G, L, E], k and v [S, K, L, E]: query heads that share a key-value head are one matrix against it."""
    samples, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(samples, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _heads_last(mixed: jax.Array) -> jax.Array:
    """[S, K, G, L, E] -> [S, L, H * E]."""
    samples, _, _, length, _ = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(samples, length, -1)


def _attend_chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: int | jax.Array,
    scale: float,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """Attention of Q consecutive queries to T positions: q [S, K, G, Q, E], k and v [S, K, T, E] -> [S, K, G, Q, E].

    Args:
        first: position of the first query among the T.
    """
    samples, groups, shared, queries, size = q.shape
    keys = k.shape[2]
    batched = ((0, 1), (0, 1))
    rows = q.reshape(samples, groups, shared * queries, size)
    scores = lax.dot_general(rows, k, (((3,), (3,)), batched), preferred_element_type=jnp.float32) * scale
    scores = _capped(scores, cap).reshape(samples, groups, shared, queries, keys)
    distance = (first + jnp.arange(queries))[:, None] - jnp.arange(keys)[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    # Not minus infinity: a query that the loop pads with may see no key, and the gradient must not become NaN there.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = lax.dot_general(weights.reshape(*rows.shape[:3], keys), v, (((3,), (2,)), batched))
    return mixed.reshape(q.shape)


def _capped(scores: jax.Array, cap: float | None) -> jax.Array:
    return scores if cap is None else jnp.tanh(scores / cap) * cap


def _attend_to_cache(
    q: jax.Array, cache: BlockKVCache, scale: float, window: int | None, cap: float | None
) -> jax.Array:
    """Attention of one new token per sequence, q [S, 1, H, E], to all positions in the cache -> [S, 1, H * E]."""
    samples, _, heads, size = q.shape
    keys, values = cache.keys, cache.values
    grouped = q.reshape(samples, keys.shape[1], -1, size).astype(jnp.float32)
    # Products of one row are limited by reading the cache. Written so, each is one loop over it as it lies in memory;
    # a matrix product would copy it first.
    scores = jnp.sum(grouped[..., None] * keys[:, :, None], axis=3) * scale
    distance = cache.position[:, None, None, None] - jnp.arange(keys.shape[3])
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(visible, _capped(scores, cap), -jnp.inf), axis=-1)
    mixed = jnp.sum(weights[..., None] * values[:, :, None], axis=3).astype(q.dtype)
    return mixed.reshape(samples, 1, heads * size)
