"""Builds the Hugging Face configuration of a llama model from the metadata of a GGUF file."""

import math
from collections.abc import Sequence

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.models.numbers import LARGEST, SMALLEST

# Metadata fields that change the computation and have no counterpart in Hugging Face's llama configuration.
UNSUPPORTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)
# Fields of that kind that change nothing only if they have this value.
NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}
# Llama's rotary base, which GGUF files of the first llama models do not store.
DEFAULT_ROPE_BASE = 10000.0
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama_config(fields: dict, vocab_size: int, rope_freqs: np.ndarray | None) -> dict:
    """Convert GGUF metadata to config.json, except for the entries that depend on the tensors (ties, biases, dtype).

    Args:
        fields: the file's metadata by key.
        vocab_size: number of rows of the token embedding.
        rope_freqs: the `rope_freqs.weight` tensor [head_dim / 2], if the file has one.

    Raises:
        BarberError: a missing or invalid field, or an unsupported feature.
    """
    refuse_unsupported(fields, "llama", UNSUPPORTED)
    heads = count(fields, "llama.attention.head_count")
    key_value_heads = count(fields, "llama.attention.head_count_kv", heads)
    if heads % key_value_heads:
        raise BarberError(f"llama.attention.head_count {heads} is not a multiple of head_count_kv {key_value_heads}")
    hidden_size = count(fields, "llama.embedding_length")
    head_dim = head_size(fields, "llama", hidden_size, heads)
    rope_theta = positive(fields, "llama.rope.freq_base", DEFAULT_ROPE_BASE)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": count(fields, "llama.feed_forward_length"),
        "num_hidden_layers": count(fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float32(positive(fields, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(fields, rope_theta, head_dim, rope_freqs),
        "max_position_embeddings": count(fields, "llama.context_length"),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def llama3_factors(rope_theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Divisors of the rotary frequencies in llama 3.1's scaling, float64 [head_dim / 2].

    They are 1 for wavelengths that are short relative to the original context and `factor` for long ones, with a smooth
    interpolation in between.
    """
    wavelength = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def refuse_unsupported(fields: dict, architecture: str, keys: Sequence[str]) -> None:
    """Raise BarberError if a field of the architecture has one of these names, and a value other than 0."""
    for key in keys:
        value = fields.get(f"{architecture}.{key}")
        if isinstance(value, str | list | np.ndarray) or value:
            raise _unsupported(architecture, key, value)
    for key, neutral in NEUTRAL.items():
        value = fields.get(f"{architecture}.{key}", neutral)
        if isinstance(value, str | list | np.ndarray) or value != neutral:
            raise _unsupported(architecture, key, value)


def _unsupported(architecture: str, key: str, value) -> BarberError:
    return BarberError(f"{architecture}.{key} = {value} is not supported; use a plain dense {architecture} model")


def head_size(fields: dict, architecture: str, hidden_size: int, heads: int) -> int:
    """Features of a head. Raises BarberError if rotary positions do not fit them all."""
    key = f"{architecture}.attention.key_length"
    if key not in fields and hidden_size % heads:
        raise BarberError(f"{architecture}.embedding_length {hidden_size} is not a multiple of head_count {heads}")
    head_dim = count(fields, key, hidden_size // heads)
    if head_dim % 2:
        raise BarberError(f"head dimension {head_dim} is odd, but RoPE needs an even one; convert the model again")
    for key in (f"{architecture}.rope.dimension_count", f"{architecture}.attention.value_length"):
        value = count(fields, key, head_dim)
        if value != head_dim:
            raise BarberError(f"{key} = {value} differs from the head dimension {head_dim}, which is not supported")
    return head_dim


def _rope_scaling(fields: dict, rope_theta: float, head_dim: int, rope_freqs: np.ndarray | None) -> dict | None:
    linear = linear_scaling(fields, "llama")
    if rope_freqs is None:
        return linear
    if linear is not None:
        raise BarberError("both llama.rope.scaling.type linear and rope_freqs.weight, which is not supported")
    return _llama3_scaling(rope_freqs, rope_theta, head_dim)


def linear_scaling(fields: dict, architecture: str) -> dict | None:
    """The linear entry of rope_scaling, or None."""
    rope = f"{architecture}.rope"
    # Files from before rope.scaling.type support linear scaling only, under another key.
    factor = positive(fields, f"{rope}.scaling.factor", positive(fields, f"{rope}.scale_linear", 1.0))
    kind = fields.get(f"{rope}.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise BarberError(f"{rope}.scaling.type {kind!r} is not supported, only none, linear and llama 3.1's")
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(rope_freqs: np.ndarray, rope_theta: float, head_dim: int) -> dict | None:
    """The llama3 entry of rope_scaling, or None if the factor is 1.

    The file stores only the divisors, so the usual parameters are assumed and must reproduce them.
    """
    factor = float(rope_freqs.max()) if rope_freqs.shape == (head_dim // 2,) else 0.0
    factors = llama3_factors(rope_theta, head_dim, factor) if 1.0 <= factor < math.inf else None
    if factors is None or not np.allclose(rope_freqs, factors, rtol=1e-5, atol=0):
        raise BarberError("rope_freqs.weight is not llama 3.1's scaling with its usual parameters; not supported")
    if factor == 1.0:
        return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def count(fields: dict, key: str, default: int | None = None) -> int:
    """A field that is a whole number above 0. Raises BarberError if it is missing or another."""
    value = _field(fields, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BarberError(f"metadata field {key} must be one whole number above 0; convert the model again")
    return value


def positive(fields: dict, key: str, default: float | None = None) -> float:
    """A field that is a number above 0. Raises BarberError if it is missing or another."""
    value = _field(fields, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
        raise BarberError(f"metadata field {key} must be one finite number above 0; convert the model again")
    return float(value)


def _field(fields: dict, key: str, default):
    value = fields.get(key, default)
    if value is None:
        raise BarberError(f"metadata field {key} is missing; convert the model again")
    return value


def float32(value: float) -> float:
    """The shortest decimal that rounds to this float32: the file stores 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
