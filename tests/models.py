"""Tiny random Hugging Face checkpoints, written by transformers itself."""

from pathlib import Path

import torch
import transformers

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def write_model(folder: Path, family: str = "llama", *, dtype=torch.float32, shard_size="5GB", **changes):
    """A random model of `family` saved in `folder`; returns it, in float32, for reference logits.

    Weights are far larger than an initialisation's, so that every part of the model shows in the logits.
    """
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**BASE, **changes}))
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
