"""Qwen2 and Qwen3, variants of LLaMA.

Qwen2 (arXiv 2407.10671) has biases on the query, key and value projections only.
Qwen3 (arXiv 2505.09388) has an RMSNorm over each head's queries and keys; head_dim is independent of hidden_size.
"""

from dataclasses import replace

from barber_jax.console.errors import BarberError
from barber_jax.models import llama
from barber_jax.models.family import HFConfig, Model

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""Defaults of absent config.json entries that differ from LLaMA's. An entry that is null is not absent."""


def build_qwen2(raw: dict, dtype) -> Model:
    """Build a Qwen2 (or Qwen2.5) `Model` that computes in `dtype`.

    Raises:
        BarberError: an entry of config.json is missing, contradictory or not supported; the message names it.
    """
    raw = {**DEFAULTS, **raw}
    config = llama.read_config(raw)
    config = replace(
        config, qkv_bias=True, o_bias=False, mlp_bias=False, window=common_window(HFConfig(raw), config.layers)
    )
    return llama.model("qwen2", config, dtype)


def build_qwen3(raw: dict, dtype) -> Model:
    """Build a Qwen3 `Model` that computes in `dtype`.

    Raises:
        BarberError: an entry of config.json is missing, contradictory or not supported; the message names it.
    """
    raw = {**DEFAULTS, "head_dim": 128, **raw}
    config = llama.read_config(raw)
    config = replace(config, qk_norm=True, mlp_bias=False, window=common_window(HFConfig(raw), config.layers))
    return llama.model("qwen3", config, dtype)


def common_window(config: HFConfig, layers: int) -> int | None:
    """Attention window of all blocks, or None for full attention.

    `layer_types` decides; if it is absent, blocks from index `max_window_layers` on have sliding-window attention.

    Raises:
        BarberError: the blocks differ (they must share one definition), or a layer type or the window is invalid.
    """
    slides = config.flag("use_sliding_window", False) and config.raw["sliding_window"] is not None
    kinds = config.raw.get("layer_types")
    if kinds is None:
        first = config.size("max_window_layers", zero=True) if slides else layers
        kinds = ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < layers)
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise BarberError(f"config.json: layer_types must be a list of {layers} kinds, one per block")
    if all(kind == "full_attention" for kind in kinds):
        return None
    if slides and all(kind == "sliding_attention" for kind in kinds):
        return config.window()
    raise BarberError(
        f"config.json: layer_types must be full_attention for all {layers} blocks, or with use_sliding_window "
        "sliding_attention for all; other layouts are not supported"
    )
