"""LLaMA in Flax NNX: RMSNorm, rotary grouped-query attention, gated MLP (arXiv 2302.13971, 2307.09288).

mistral.py and qwen.py build on these modules; what they add are switches of `LlamaConfig`.
"""

from dataclasses import dataclass

import jax
from flax import nnx

from barber_jax.models.attention import BlockKVCache, attend
from barber_jax.models.decoder import Block, GatedMLP, Head, SubBlock, Tap, linear, rms_norm
from barber_jax.models.family import HFConfig, Model, Names
from barber_jax.models.rope import Rope

SUB_BLOCKS = (
    SubBlock(
        "self_attn",
        (
            ("self_attn.q_proj", "self_attn.in"),
            ("self_attn.k_proj", "self_attn.in"),
            ("self_attn.v_proj", "self_attn.in"),
            ("self_attn.o_proj", "self_attn.mid"),
        ),
        ("input_layernorm",),
    ),
    SubBlock(
        "mlp",
        (("mlp.gate_proj", "mlp.in"), ("mlp.up_proj", "mlp.in"), ("mlp.down_proj", "mlp.mid")),
        ("post_attention_layernorm",),
    ),
)


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and switches of a LLaMA-like decoder.

    Attributes:
        qk_norm: whether each head's query and key go through an RMSNorm before the rotation.
        window: number of latest positions that a query sees, including its own; None for all.
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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    rope: Rope
    qk_norm: bool = False
    window: int | None = None


class LlamaAttention(nnx.Module):
    """Causal self-attention with rotary positions and grouped queries: H query heads share K key-value heads.

    A family with other norms of queries and keys, or another rotation, window, scale or bound of the scores, sets these
    in a constructor of its own.
    """

    def __init__(self, config: LlamaConfig, dtype, rngs: nnx.Rngs):
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = linear(config.hidden, queries, config.qkv_bias, dtype, rngs)
        self.k_proj = linear(config.hidden, keys, config.qkv_bias, dtype, rngs)
        self.v_proj = linear(config.hidden, keys, config.qkv_bias, dtype, rngs)
        self.o_proj = linear(queries, config.hidden, config.o_bias, dtype, rngs)
        if config.qk_norm:
            self.q_norm = rms_norm(config.head_size, config.norm_epsilon, dtype, rngs)
            self.k_norm = rms_norm(config.head_size, config.norm_epsilon, dtype, rngs)
        self.config, self.rope, self.window = config, config.rope, config.window
        self.scale, self.cap = config.head_size**-0.5, None

    def __call__(self, x: jax.Array, tap: Tap, cache: BlockKVCache | None = None) -> jax.Array:
        config = self.config
        heads = (*x.shape[:2], -1, config.head_size)
        tap("self_attn.in", x)
        q, k, v = (projection(x).reshape(heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        position = None if cache is None else cache.position
        q, k = self.rope.rotate(q, position), self.rope.rotate(k, position)
        mixed = attend(q, k, v, self.scale, self.window, cache, self.cap)
        tap("self_attn.mid", mixed)
        return self.o_proj(mixed)


class LlamaBlock(Block):
    """Pre-norm block: attention, then MLP."""

    def __init__(self, config: LlamaConfig, dtype, rngs: nnx.Rngs):
        self.input_layernorm = rms_norm(config.hidden, config.norm_epsilon, dtype, rngs)
        self.self_attn = LlamaAttention(config, dtype, rngs)
        self.post_attention_layernorm = rms_norm(config.hidden, config.norm_epsilon, dtype, rngs)
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.activation, config.mlp_bias, dtype, rngs)

    def enter(self, sub: str, hidden: jax.Array) -> jax.Array:
        return (self.input_layernorm if sub == "self_attn" else self.post_attention_layernorm)(hidden)


class LlamaEmbed(nnx.Module):
    """Token embedding."""

    def __init__(self, config: LlamaConfig, dtype, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocabulary, config.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, position: jax.Array | None = None) -> jax.Array:
        return self.embed_tokens(ids)


class LlamaHead(Head):
    """Final norm and language-model head."""

    def __init__(self, config: LlamaConfig, dtype, rngs: nnx.Rngs):
        self.norm = rms_norm(config.hidden, config.norm_epsilon, dtype, rngs)
        self.lm_head = linear(config.hidden, config.vocabulary, False, dtype, rngs)

    def final(self, hidden: jax.Array) -> jax.Array:
        return self.norm(hidden)


def read_config(raw: dict) -> LlamaConfig:
    """Read the config.json of a LLaMA model; absent entries have LLaMA's defaults.

    Raises:
        BarberError: an entry is missing, contradictory or not supported; the message names it.
    """
    config = HFConfig(raw)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    config.require_multiple("num_attention_heads", "num_key_value_heads", heads, kv_heads)
    if raw.get("head_dim") is None:
        config.require_multiple("hidden_size", "num_attention_heads", hidden, heads)
    positions = config.size("max_position_embeddings", 2048)
    head_size, rope = (
        config.size("head_dim", hidden // heads),
        Rope.from_hf({**raw, "max_position_embeddings": positions}),
    )
    rope.check(head_size)
    bias = config.flag("attention_bias", False)
    return LlamaConfig(
        vocabulary=config.size("vocab_size"),
        hidden=hidden,
        intermediate=config.size("intermediate_size"),
        layers=config.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        positions=positions,
        norm_epsilon=config.norm_epsilon("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        tied=config.flag("tie_word_embeddings", False),
        rope=rope,
    )


def names(config: LlamaConfig) -> Names:
    """Build the name table of the parameters that this configuration has."""
    layer = "model.layers.{i}."
    block = {f"{norm}.scale": f"{layer}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    if config.qk_norm:
        block |= {f"self_attn.{norm}.scale": f"{layer}self_attn.{norm}.weight" for norm in ("q_norm", "k_norm")}
    biased = {"q_proj": config.qkv_bias, "k_proj": config.qkv_bias, "v_proj": config.qkv_bias, "o_proj": config.o_bias}
    for sub in SUB_BLOCKS:
        for path, _ in sub.linears:
            block[f"{path}.kernel"] = f"{layer}{path}.weight"
            if biased.get(path.rpartition(".")[2], config.mlp_bias):
                block[f"{path}.bias"] = f"{layer}{path}.bias"
    return Names(
        embed={"embed_tokens.embedding": "model.embed_tokens.weight"},
        block=block,
        head={
            "norm.scale": "model.norm.weight",
            "lm_head.kernel": "model.embed_tokens.weight" if config.tied else "lm_head.weight",
        },
        ignored=("rotary_emb.inv_freq",),
    )


def build(raw: dict, dtype) -> Model:
    """Build a LLaMA `Model` that computes in `dtype`."""
    return model("llama", read_config(raw), dtype)


def model(model_type: str, config: LlamaConfig, dtype) -> Model:
    """Build a `Model` of LLaMA or of a family that derives from it, computing in `dtype`."""
    return Model(
        model_type=model_type,
        layers=config.layers,
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        positions=config.positions,
        sub_blocks=SUB_BLOCKS,
        names=names(config),
        tied_embedding=config.tied,
        make_embed=lambda rngs: LlamaEmbed(config, dtype, rngs),
        make_block=lambda rngs, _: LlamaBlock(config, dtype, rngs),
        make_head=lambda rngs: LlamaHead(config, dtype, rngs),
        settings=config,
    )
