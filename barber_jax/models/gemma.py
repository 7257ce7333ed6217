"""Gemma 2 and Gemma 3 in Flax NNX (arXiv 2408.00118, 2503.19786).

Norms before and behind each sub-block, scaled embeddings, attention over a sliding window in some blocks. Gemma 2
bounds attention scores and logits; Gemma 3 has norms of each head's queries and keys, and rotary settings of their own
for the blocks whose attention slides.

What a sub-block adds to the residual stream is what the norm behind it gives, so that norm is part of the sub-block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from barber_jax.console.errors import BarberError
from barber_jax.models import llama
from barber_jax.models.attention import BlockKVCache
from barber_jax.models.decoder import Block, GatedMLP, Head, Tap, linear
from barber_jax.models.family import HFConfig, Model, Names
from barber_jax.models.numbers import positive
from barber_jax.models.rope import Rope

SLIDING, FULL = "sliding_attention", "full_attention"
"""The kinds of block, as in `layer_types`."""

NORMS = {
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
"""The norms before and behind each sub-block."""
SUB_BLOCKS = tuple(replace(sub, norms=NORMS[sub.name], ends_in_linear=False) for sub in llama.SUB_BLOCKS)

DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""What an absent entry of config.json means in both. An entry that is null is not absent."""
GEMMA2 = DEFAULTS | {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "sliding_window_pattern": 2,
}
GEMMA3 = DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6}
THETA = {SLIDING: ("rope_local_base_freq", 1e4), FULL: ("rope_theta", 1e6)}
"""Gemma 3: the older entry for each kind's rotary base, and its default."""

VISION = ("vision_tower.", "multi_modal_projector.")
"""Beginnings of the names of a `gemma3` checkpoint's tensors that are not the language model's."""


@dataclass(frozen=True)
class GemmaConfig:
    """The sizes and switches of a Gemma decoder that are the same for all blocks.

    Attributes:
        scale: factor on the attention scores.
        qk_norm: whether each head's query and key go through an RMSNorm before the rotation.
        attention_cap, final_cap: bounds of the attention scores and of the logits; None for none.
        window: number of latest positions that a query of a sliding block sees, including its own; None if no block
            slides.
        ropes: rotary settings of each kind of block.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    norm_epsilon: float
    activation: str
    bias: bool
    tied: bool
    scale: float
    qk_norm: bool
    attention_cap: float | None
    final_cap: float | None
    window: int | None
    ropes: tuple[tuple[str, Rope], ...]


class GemmaNorm(nnx.Module):
    """RMSNorm whose scale is stored minus 1; computed in float32, output in the input's dtype."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class GemmaAttention(llama.LlamaAttention):
    """LLaMA's attention with Gemma's norms, scale and bound of the scores, over a window or all positions."""

    def __init__(self, config: GemmaConfig, kind: str, dtype, rngs: nnx.Rngs):
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = linear(config.hidden, queries, config.bias, dtype, rngs)
        self.k_proj = linear(config.hidden, keys, config.bias, dtype, rngs)
        self.v_proj = linear(config.hidden, keys, config.bias, dtype, rngs)
        self.o_proj = linear(queries, config.hidden, config.bias, dtype, rngs)
        if config.qk_norm:
            self.q_norm = GemmaNorm(config.head_size, config.norm_epsilon)
            self.k_norm = GemmaNorm(config.head_size, config.norm_epsilon)
        self.config, self.rope = config, dict(config.ropes)[kind]
        self.window = config.window if kind == SLIDING else None
        self.scale, self.cap = config.scale, config.attention_cap


class GemmaBlock(Block):
    """Attention, then MLP, each between two norms: that behind it belongs to the sub-block."""

    def __init__(self, config: GemmaConfig, kind: str, dtype, rngs: nnx.Rngs):
        self.self_attn = GemmaAttention(config, kind, dtype, rngs)
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.activation, False, dtype, rngs)
        for norm in (*NORMS["self_attn"], *NORMS["mlp"]):
            setattr(self, norm, GemmaNorm(config.hidden, config.norm_epsilon))

    def enter(self, sub: str, hidden: jax.Array) -> jax.Array:
        return getattr(self, NORMS[sub][0])(hidden)

    def apply(self, sub: str, x: jax.Array, tap: Tap | None = None, cache: BlockKVCache | None = None) -> jax.Array:
        return getattr(self, NORMS[sub][1])(super().apply(sub, x, tap, cache))


class GemmaEmbed(nnx.Module):
    """Token embedding times the square root of the hidden size, rounded to the compute dtype as in Hugging Face's."""

    def __init__(self, config: GemmaConfig, dtype, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocabulary, config.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, position: jax.Array | None = None) -> jax.Array:
        tokens = self.embed_tokens(ids)
        return tokens * jnp.asarray(np.float32(tokens.shape[-1] ** 0.5), tokens.dtype)


class GemmaHead(Head):
    """Final norm and language-model head, whose logits may be bounded."""

    def __init__(self, config: GemmaConfig, dtype, rngs: nnx.Rngs):
        self.norm = GemmaNorm(config.hidden, config.norm_epsilon)
        self.lm_head = linear(config.hidden, config.vocabulary, False, dtype, rngs)
        self.cap = config.final_cap

    def final(self, hidden: jax.Array) -> jax.Array:
        return self.norm(hidden)

    def __call__(self, hidden: jax.Array, embedding: nnx.Embed | None = None) -> jax.Array:
        logits = super().__call__(hidden, embedding)
        return logits if self.cap is None else jnp.tanh(logits / self.cap) * self.cap


def build_gemma2(raw: dict, dtype) -> Model:
    """Build a Gemma 2 `Model` that computes in `dtype`.

    Raises:
        BarberError: an entry of config.json is missing, contradictory or not supported; the message names it.
    """
    # Unlike Gemma 3's, its pattern is no entry of config.json.
    raw = {**GEMMA2, **raw, "sliding_window_pattern": GEMMA2["sliding_window_pattern"]}
    kind, positions = _kinds(raw), HFConfig(raw).size("max_position_embeddings")
    ropes = dict.fromkeys(_used(kind, raw), Rope.from_hf({**raw, "max_position_embeddings": positions}))
    return _model("gemma2", _read_config(raw, False, ropes), kind, "model.", dtype)


def build_gemma3_text(raw: dict, dtype) -> Model:
    """Build a `Model` of Gemma 3, a language model alone, that computes in `dtype`. Raises as `build_gemma2`."""
    return _gemma3("gemma3_text", raw, "model.", dtype)


def build_gemma3(raw: dict, dtype) -> Model:
    """Build the language `Model` of a Gemma 3 that has a vision tower too. Raises as `build_gemma2`."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise BarberError("config.json: text_config is missing: without a language model there is nothing to prune")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise BarberError(f"config.json: text_config: model_type {text['model_type']!r} is not gemma3_text")
    for level in (raw, text):
        if not HFConfig(level).flag("tie_word_embeddings", True):
            raise BarberError("config.json: tie_word_embeddings false is not supported for gemma3; fetch it again")
    return _gemma3("gemma3", text, "language_model.model.", dtype)


def _gemma3(model_type: str, raw: dict, prefix: str, dtype) -> Model:
    raw = {**GEMMA3, **raw}
    kind = _kinds(raw)
    ropes = {each: _rope(raw, each) for each in _used(kind, raw)}
    return _model(model_type, _read_config(raw, True, ropes), kind, prefix, dtype)


def _kinds(raw: dict) -> Callable[[int], str]:
    """Index of a block -> its kind: as `layer_types` says or, without, every nth attends to all positions."""
    given, layers = raw.get("layer_types"), HFConfig(raw).size("num_hidden_layers")
    if given is None:
        pattern = HFConfig(raw).size("sliding_window_pattern")
        return lambda index: SLIDING if (index + 1) % pattern else FULL
    if not isinstance(given, list) or len(given) != layers or not all(each in (SLIDING, FULL) for each in given):
        raise BarberError(f"config.json: layer_types must be a list of {layers} kinds, each {SLIDING} or {FULL}")
    return given.__getitem__


def _used(kind: Callable[[int], str], raw: dict) -> list[str]:
    """The kinds that there are."""
    # Not all of the layers: a damaged file may ask for billions.
    return sorted({kind(index) for index in range(min(raw["num_hidden_layers"], 10_000))})


def _rope(raw: dict, kind: str) -> Rope:
    """Rotary settings of one kind of block of Gemma 3.

    In `rope_parameters` each kind has its own, as transformers 5 writes them; `rope_scaling`, `rope_theta` and
    `rope_local_base_freq` are the older entries, the first two for blocks that attend to all positions.
    """
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict | None):
        raise BarberError("config.json: rope_parameters and rope_scaling must be objects")
    if parameters.keys() - {SLIDING, FULL}:
        raise BarberError(f"config.json: rope_parameters of gemma3 must be objects for {SLIDING} and {FULL}")
    given = parameters.get(kind)
    if not isinstance(given, dict | None):
        raise BarberError(f"config.json: rope_parameters: {kind} must be an object, not {given!r}")
    given = {**(given or {}), **((scaling or {}) if kind == FULL else {})}
    key, default = THETA[kind]
    given.setdefault("rope_theta", raw.get(key, default))
    positions = HFConfig(raw).size("max_position_embeddings")
    return Rope.from_hf({"rope_parameters": given, "max_position_embeddings": positions})


def _read_config(raw: dict, qk_norm: bool, ropes: dict[str, Rope]) -> GemmaConfig:
    """Read config.json, absent entries filled in."""
    config = HFConfig(raw)
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    config.require_multiple("num_attention_heads", "num_key_value_heads", heads, kv_heads)
    if raw.get("use_bidirectional_attention"):
        raise BarberError("config.json: use_bidirectional_attention is not supported: only decoders can be pruned")
    head_size = config.size("head_dim")
    for rope in ropes.values():
        rope.check(head_size)
    return GemmaConfig(
        vocabulary=config.size("vocab_size"),
        hidden=config.size("hidden_size"),
        intermediate=config.size("intermediate_size"),
        layers=config.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        positions=config.size("max_position_embeddings"),
        norm_epsilon=config.norm_epsilon("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        bias=config.flag("attention_bias", False),
        tied=config.flag("tie_word_embeddings", True),
        scale=positive("query_pre_attn_scalar", raw["query_pre_attn_scalar"]) ** -0.5,
        qk_norm=qk_norm,
        # Gemma 3 has the entry, but transformers computes without it.
        attention_cap=None if qk_norm else _cap(raw, "attn_logit_softcapping"),
        final_cap=_cap(raw, "final_logit_softcapping"),
        window=config.window() if SLIDING in ropes else None,
        ropes=tuple(sorted(ropes.items())),
    )


def _cap(raw: dict, key: str) -> float | None:
    return None if raw.get(key) is None else positive(key, raw[key])


def _names(config: GemmaConfig, prefix: str) -> Names:
    layer = prefix + "layers.{i}."
    block = {f"{norm}.scale": f"{layer}{norm}.weight" for sub in SUB_BLOCKS for norm in sub.norms}
    if config.qk_norm:
        block |= {f"self_attn.{norm}.scale": f"{layer}self_attn.{norm}.weight" for norm in ("q_norm", "k_norm")}
    for sub in SUB_BLOCKS:
        for path, _ in sub.linears:
            block[f"{path}.kernel"] = f"{layer}{path}.weight"
            if config.bias and sub.name == "self_attn":
                block[f"{path}.bias"] = f"{layer}{path}.bias"
    tokens = f"{prefix}embed_tokens.weight"
    return Names(
        embed={"embed_tokens.embedding": tokens},
        block=block,
        head={"norm.scale": f"{prefix}norm.weight", "lm_head.kernel": tokens if config.tied else "lm_head.weight"},
        ignored=("rotary_emb.inv_freq",),
        carried=VISION if prefix != "model." else (),
    )


def _model(model_type: str, config: GemmaConfig, kind: Callable[[int], str], prefix: str, dtype) -> Model:
    return Model(
        model_type=model_type,
        layers=config.layers,
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        positions=config.positions,
        sub_blocks=SUB_BLOCKS,
        names=_names(config, prefix),
        tied_embedding=config.tied,
        make_embed=lambda rngs: GemmaEmbed(config, dtype, rngs),
        make_block=lambda rngs, kind: GemmaBlock(config, kind, dtype, rngs),
        make_head=lambda rngs: GemmaHead(config, dtype, rngs),
        settings=config,
        kind=kind,
        begins=True,
    )
