"""Tiny random Hugging Face checkpoints, written by transformers itself, and logits of both sides."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.forward import dense as forward
from barber_jax.models import build_model

COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
BASE = dict(**COMMON, intermediate_size=48, num_key_value_heads=2)
"""LLaMA's and its relatives' sizes."""

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, BASE),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, BASE),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, dict(**COMMON, ffn_dim=48)),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, BASE),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {**BASE, "head_dim": 12}),
}

IDS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (1, 3, 40)).astype(np.int32)
"""Token ids of one micro-batch [M, B, L]."""


def write_model(folder: Path, family: str = "llama", *, dtype=torch.float32, shard_size="5GB", **changes):
    """A random model of `family` saved in `folder`; returns it, in float32, for reference logits.

    Weights are far larger than an initialisation's, so that every part of the model shows in the logits.
    """
    config_class, model_class, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales about 1; everything else, biases too, wide enough to matter.
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.float().eval()


def logits(model, ids):
    """float32 logits [S, L, vocabulary] of transformers' model, as NumPy."""
    with torch.no_grad():
        return model(torch.as_tensor(ids).long()).logits.numpy()


def our_logits(folder, dtype=jnp.float32, ids=IDS):
    """float32 logits [S, L, vocabulary] of our streamed forward on ids [M, B, L]."""
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config, jnp.dtype(dtype))
    check_tensors(checkpoint, model)
    return np.concatenate([np.asarray(batch) for batch in forward.logits(checkpoint, model, ids)])


def assert_same_logits(folder, reference):
    """The checkpoint in `folder` computes what transformers' model computes."""
    np.testing.assert_allclose(our_logits(folder), logits(reference, IDS[0]), atol=1e-4, rtol=0)
