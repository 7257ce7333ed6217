"""OPT in Flax NNX: LayerNorm, learned positions, multi-head attention, two-layer MLP (arXiv 2205.01068).

There are two layouts. Pre-norm (all sizes but one): a sub-block reads the normalised hidden state, and there is a final
norm before the head. Post-norm (the 350m layout): a sub-block reads the hidden state itself and is followed by
residual and norm; there is no final norm, and the embedding may be narrower than the hidden state.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from barber_jax.models.attention import BlockKVCache, attend
from barber_jax.models.decoder import ACTIVATIONS, Block, Head, SubBlock, Tap, layer_norm, linear
from barber_jax.models.family import HFConfig, Model, Names

SUB_BLOCKS = (
    SubBlock(
        "self_attn",
        (
            ("self_attn.q_proj", "self_attn.in"),
            ("self_attn.k_proj", "self_attn.in"),
            ("self_attn.v_proj", "self_attn.in"),
            ("self_attn.out_proj", "self_attn.mid"),
        ),
        ("self_attn_layer_norm",),
    ),
    SubBlock("mlp", (("mlp.fc1", "mlp.in"), ("mlp.fc2", "mlp.mid")), ("final_layer_norm",)),
)

POSITION_OFFSET = 2
"""Row of the position table for position 0. The rows before it are for padding and are never read."""


@dataclass(frozen=True)
class OPTConfig:
    """The sizes and switches of an OPT decoder; `embedding` is the width of a token's embedding."""

    vocabulary: int
    embedding: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    positions: int
    activation: str
    bias: bool
    affine_norm: bool
    pre_norm: bool
    final_norm: bool
    tied: bool

    @property
    def projected(self) -> bool:
        """Whether the embedding is projected to the hidden size and back."""
        return self.embedding != self.hidden


class OPTAttention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: OPTConfig, dtype, rngs: nnx.Rngs):
        self.q_proj = linear(config.hidden, config.hidden, config.bias, dtype, rngs)
        self.k_proj = linear(config.hidden, config.hidden, config.bias, dtype, rngs)
        self.v_proj = linear(config.hidden, config.hidden, config.bias, dtype, rngs)
        self.out_proj = linear(config.hidden, config.hidden, config.bias, dtype, rngs)
        self.head_size = config.hidden // config.heads

    def __call__(self, x: jax.Array, tap: Tap, cache: BlockKVCache | None = None) -> jax.Array:
        heads = (*x.shape[:2], -1, self.head_size)
        tap("self_attn.in", x)
        # The query is scaled, not the scores, as in Hugging Face's model, so that both round alike.
        q = (self.q_proj(x) * self.head_size**-0.5).reshape(heads)
        mixed = attend(q, self.k_proj(x).reshape(heads), self.v_proj(x).reshape(heads), 1.0, cache=cache)
        tap("self_attn.mid", mixed)
        return self.out_proj(mixed)


class OPTMLP(nnx.Module):
    """Two-layer MLP: fc2(act(fc1(x)))."""

    def __init__(self, config: OPTConfig, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden, config.intermediate, config.bias, dtype, rngs)
        self.fc2 = linear(config.intermediate, config.hidden, config.bias, dtype, rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        tap("mlp.in", x)
        inner = ACTIVATIONS[self.activation](self.fc1(x))
        tap("mlp.mid", inner)
        return self.fc2(inner)


class OPTBlock(Block):
    """Attention, then MLP, in either layout.

    Pre-norm: `enter` normalises. Post-norm: `enter` is the identity, so that a sub-block is pruned and rebuilt on the
    hidden state, which is what its linears read; `leave` normalises after the residual. In both, the reconstruction
    loss is on the sub-block's output, before residual and norm.
    """

    def __init__(self, config: OPTConfig, dtype, rngs: nnx.Rngs):
        self.self_attn_layer_norm = layer_norm(config.hidden, config.affine_norm, dtype, rngs)
        self.self_attn = OPTAttention(config, dtype, rngs)
        self.final_layer_norm = layer_norm(config.hidden, config.affine_norm, dtype, rngs)
        self.mlp = OPTMLP(config, dtype, rngs)
        self.pre_norm = config.pre_norm

    def enter(self, sub: str, hidden: jax.Array) -> jax.Array:
        return self._norm(sub, hidden) if self.pre_norm else hidden

    def leave(self, sub: str, hidden: jax.Array, y: jax.Array) -> jax.Array:
        after = super().leave(sub, hidden, y)
        return after if self.pre_norm else self._norm(sub, after)

    def norm_variance(self, residual: jax.Array) -> jax.Array:
        return jnp.var(residual, axis=-1)

    def _norm(self, sub: str, x: jax.Array) -> jax.Array:
        return (self.self_attn_layer_norm if sub == "self_attn" else self.final_layer_norm)(x)


class OPTEmbed(nnx.Module):
    """Token embedding, projected if it is narrower than the hidden state, plus learned position embedding."""

    def __init__(self, config: OPTConfig, dtype, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocabulary, config.embedding, dtype=dtype, rngs=rngs)
        self.project_in = linear(config.embedding, config.hidden, False, dtype, rngs) if config.projected else None
        self.embed_positions = nnx.Embed(config.positions + POSITION_OFFSET, config.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, position: jax.Array | None = None) -> jax.Array:
        tokens = self.embed_tokens(ids)
        if self.project_in is not None:
            tokens = self.project_in(tokens)
        positions = jnp.arange(ids.shape[-1]) if position is None else position[:, None]
        return tokens + self.embed_positions(positions + POSITION_OFFSET)


class OPTHead(Head):
    """Final norm and projection, if the layout has them, and the language-model head."""

    def __init__(self, config: OPTConfig, dtype, rngs: nnx.Rngs):
        norm = config.final_norm
        self.final_layer_norm = layer_norm(config.hidden, config.affine_norm, dtype, rngs) if norm else None
        self.project_out = linear(config.hidden, config.embedding, False, dtype, rngs) if config.projected else None
        self.lm_head = linear(config.embedding, config.vocabulary, False, dtype, rngs)

    def final(self, hidden: jax.Array) -> jax.Array:
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return hidden


def read_config(raw: dict) -> OPTConfig:
    """Read the config.json of an OPT model; absent entries have OPT's defaults.

    Raises:
        BarberError: an entry is missing, contradictory or not supported; the message names it.
    """
    config = HFConfig(raw)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    config.require_multiple("hidden_size", "num_attention_heads", hidden, heads)
    pre_norm = config.flag("do_layer_norm_before", True)
    return OPTConfig(
        vocabulary=config.size("vocab_size"),
        embedding=config.size("word_embed_proj_dim", hidden),
        hidden=hidden,
        intermediate=config.size("ffn_dim"),
        layers=config.size("num_hidden_layers"),
        heads=heads,
        positions=config.size("max_position_embeddings", 2048),
        activation=config.activation("activation_function", "relu"),
        bias=config.flag("enable_bias", True),
        affine_norm=config.flag("layer_norm_elementwise_affine", True),
        pre_norm=pre_norm,
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        tied=config.flag("tie_word_embeddings", True),
    )


def names(config: OPTConfig) -> Names:
    """Build the name table of the parameters that this configuration has."""
    decoder, layer = "model.decoder.", "model.decoder.layers.{i}."

    def norm(name: str, prefix: str) -> dict[str, str]:
        if not config.affine_norm:
            return {}
        return {f"{name}.scale": f"{prefix}{name}.weight", f"{name}.bias": f"{prefix}{name}.bias"}

    def projection(name: str) -> dict[str, str]:
        return {f"{name}.kernel": f"{decoder}{name}.weight"} if config.projected else {}

    block = norm("self_attn_layer_norm", layer) | norm("final_layer_norm", layer)
    for sub in SUB_BLOCKS:
        for path, _ in sub.linears:
            # Hugging Face has no module for the MLP: fc1 and fc2 belong to the layer.
            name = layer + path.removeprefix("mlp.")
            block[f"{path}.kernel"] = f"{name}.weight"
            if config.bias:
                block[f"{path}.bias"] = f"{name}.bias"
    tokens = f"{decoder}embed_tokens.weight"
    return Names(
        embed={
            "embed_tokens.embedding": tokens,
            **projection("project_in"),
            "embed_positions.embedding": f"{decoder}embed_positions.weight",
        },
        block=block,
        head={
            **(norm("final_layer_norm", decoder) if config.final_norm else {}),
            **projection("project_out"),
            "lm_head.kernel": tokens if config.tied else "lm_head.weight",
        },
        ignored=("decoder.version",),
    )


def build(raw: dict, dtype) -> Model:
    """Build an OPT `Model` that computes in `dtype`."""
    config = read_config(raw)
    return Model(
        model_type="opt",
        layers=config.layers,
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        positions=config.positions,
        sub_blocks=SUB_BLOCKS,
        names=names(config),
        tied_embedding=config.tied,
        make_embed=lambda rngs: OPTEmbed(config, dtype, rngs),
        make_block=lambda rngs, _: OPTBlock(config, dtype, rngs),
        make_head=lambda rngs: OPTHead(config, dtype, rngs),
        settings=config,
    )
