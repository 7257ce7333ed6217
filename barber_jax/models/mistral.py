"""Mistral (arXiv 2310.06825): LLaMA without biases, where a query sees the latest `sliding_window` positions."""

from dataclasses import replace

from barber_jax.models import llama
from barber_jax.models.family import HFConfig, Model

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
"""Defaults of absent config.json entries that differ from LLaMA's. An entry that is null is not absent."""


def build(raw: dict, dtype) -> Model:
    """Build a Mistral `Model` that computes in `dtype`.

    Raises:
        BarberError: an entry of config.json is missing, contradictory or not supported; the message names it.
    """
    raw = {**DEFAULTS, **raw}
    window = None if raw["sliding_window"] is None else HFConfig(raw).window()
    config = replace(llama.read_config(raw), qkv_bias=False, o_bias=False, mlp_bias=False, window=window)
    return llama.model("mistral", config, dtype)
