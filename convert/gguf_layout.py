"""Which tensors a GGUF file of an architecture holds, under which names, and how they differ from Hugging Face's."""

from collections.abc import Iterator
from typing import NamedTuple

ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class Source(NamedTuple):
    """Where a Hugging Face tensor comes from.

    Attributes:
        stored: its GGUF name.
        shape: its shape.
        rotary_heads: number of heads whose rows llama.cpp reorders for its rotation; 0 if it does not.
        added: what llama.cpp adds to every value.
    """

    stored: str
    shape: tuple[int, ...]
    rotary_heads: int = 0
    added: float = 0.0


class Layout(NamedTuple):
    """What differs between architectures.

    Attributes:
        norms: Hugging Face name of a block's norm -> its GGUF name.
        permuted: whether rows of queries and keys are reordered.
        added: what is added to the norms' weights.
    """

    norms: dict[str, str]
    permuted: bool = False
    added: float = 0.0


_GEMMA2 = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LAYOUTS = {
    "llama": Layout({"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}, permuted=True),
    "gemma2": Layout(_GEMMA2, added=1.0),
    "gemma3": Layout({**_GEMMA2, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}, added=1.0),
}
"""Architecture -> layout of its files."""


def model_tensors(architecture: str, config: dict) -> Iterator[tuple[str, Source]]:
    """Hugging Face name and GGUF source of every tensor of a model with this configuration."""
    layout = LAYOUTS[architecture]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", Source("token_embd.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, source in _layer_tensors(layout, config):
            yield f"model.layers.{layer}.{name}", source._replace(stored=f"blk.{layer}.{source.stored}")
    yield "model.norm.weight", Source("output_norm.weight", (hidden,), added=layout.added)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", Source("output.weight", (vocab, hidden))


def _layer_tensors(layout: Layout, config: dict) -> Iterator[tuple[str, Source]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query, key = heads * config["head_dim"], key_value_heads * config["head_dim"]
    for name, stored in layout.norms.items():
        size = config["head_dim"] if name.startswith("self_attn.") else hidden
        yield f"{name}.weight", Source(f"{stored}.weight", (size,), added=layout.added)
    shapes = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    rotary = {"attn_q": heads, "attn_k": key_value_heads} if layout.permuted else {}
    for module, name in (ATTENTION | MLP).items():
        yield f"{name}.weight", Source(f"{module}.weight", shapes[module], rotary.get(module, 0))
        if config.get("attention_bias" if module in ATTENTION else "mlp_bias"):
            yield f"{name}.bias", Source(f"{module}.bias", shapes[module][:1], rotary.get(module, 0))
