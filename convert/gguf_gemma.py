"""Builds the Hugging Face configuration of a Gemma 2 or 3 model from the metadata of a GGUF file."""

from barber_jax.convert.gguf_config import (
    UNSUPPORTED,
    count,
    float32,
    head_size,
    linear_scaling,
    positive,
    refuse_unsupported,
)

HANDLED = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Fields that change the computation, and that these models have."""
LARGEST_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Blocks of the 27B models, whose attention scores are scaled by hidden_size / heads, as llama.cpp tells them too."""
PATTERN = {"gemma2": 2, "gemma3": 6}
"""Every how many blocks one attends to all positions; files do not say."""


def gemma_config(architecture: str, fields: dict, vocab_size: int) -> dict:
    """Convert GGUF metadata to config.json, except for the entries that depend on the tensors (ties, biases, dtype).

    Args:
        architecture: gemma2 or gemma3.
        fields: the file's metadata by key.
        vocab_size: number of rows of the token embedding.

    Raises:
        BarberError: a missing or invalid field, or an unsupported feature.
    """
    refuse_unsupported(fields, architecture, [key for key in UNSUPPORTED if key not in HANDLED])

    def whole(key: str, default: int | None = None) -> int:
        return count(fields, f"{architecture}.{key}", default)

    def number(key: str, default: float | None = None) -> float:
        return positive(fields, f"{architecture}.{key}", default)

    layers, hidden, heads = whole("block_count"), whole("embedding_length"), whole("attention.head_count")
    head_dim = head_size(fields, architecture, hidden, heads)
    first = architecture == "gemma2"
    pattern = PATTERN[architecture]
    config = {
        "architectures": ["Gemma2ForCausalLM" if first else "Gemma3ForCausalLM"],
        "model_type": "gemma2" if first else "gemma3_text",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == LARGEST_LAYERS[architecture] else head_dim,
        "rms_norm_eps": float32(number("attention.layer_norm_rms_epsilon")),
        "sliding_window": whole("attention.sliding_window", 4096),
        "sliding_window_pattern": pattern,
        "rope_theta": number("rope.freq_base", 1e4 if first else 1e6),
        "rope_scaling": linear_scaling(fields, architecture),
        "max_position_embeddings": whole("context_length"),
        "final_logit_softcapping": number("final_logit_softcapping", 30.0) if first else None,
        "attn_logit_softcapping": number("attn_logit_softcapping", 50.0) if first else None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if not first:
        config["rope_local_base_freq"] = number("rope.freq_base_swa", 1e4)
        if f"{architecture}.final_logit_softcapping" in fields:
            config["final_logit_softcapping"] = number("final_logit_softcapping")
    return config
