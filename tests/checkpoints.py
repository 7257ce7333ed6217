"""Tiny random Hugging Face checkpoints, written without PyTorch, and logits of both sides."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - gives NumPy the dtype bfloat16
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from barber_jax.convert.checkpoint import open_checkpoint, split_files
from barber_jax.convert.hf_folder import INDEX
from barber_jax.convert.parameters import check_tensors
from barber_jax.forward import dense
from barber_jax.models import build_model

COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
BASE = dict(**COMMON, intermediate_size=48, num_key_value_heads=2)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Rotary settings of Llama 3."""
"""LLaMA's and its relatives' sizes."""

GEMMA = {**BASE, "head_dim": 12, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
"""Gemma's sizes: one block of each kind."""

FAMILIES = {
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE),
    "mistral": ("MistralConfig", "MistralForCausalLM", BASE),
    "opt": ("OPTConfig", "OPTForCausalLM", dict(**COMMON, ffn_dim=48)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", BASE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**BASE, "head_dim": 12}),
}
"""Family -> transformers' classes for its configuration and model, and sizes."""

IDS = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (1, 3, 40)).astype(np.int32)
"""Token ids of one micro-batch [M, B, L]."""


class _Torch:
    """PyTorch where a test uses it, which is skipped where there is none."""

    def __getattr__(self, name):
        return getattr(pytest.importorskip("torch"), name)


torch = _Torch()


def write_model(folder: Path, family: str = "llama", *, dtype: str = "float32", shard_size: int = 10**9, **changes):
    """Write a random model of `family` into `folder`, as transformers would save it.

    Weights are far larger than an initialisation's, so that every part of the model shows in the logits.
    """
    config_class, architecture, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**sizes, **changes}, architectures=[architecture], dtype=dtype)
    config.save_pretrained(folder)
    tensors = random_tensors(json.loads((Path(folder) / "config.json").read_text()), dtype)
    files = split_files({name: tensor.nbytes for name, tensor in tensors.items()}, shard_size)
    for file in set(files.values()):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(held, Path(folder) / file, {"format": "pt"})
    if len(set(files.values())) > 1:
        (Path(folder) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def random_tensors(config: dict, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors of a model, under Hugging Face's names, tied ones once."""
    model = build_model(config, jnp.dtype("float32"))
    rng, tensors = np.random.default_rng(0), {}
    parts = [(model.embed(), model.names.embed), (model.head(), model.names.head)]
    parts += [(model.block(), model.names.of_block(index)) for index in range(model.layers)]
    for definition, table in parts:
        for path, shape in definition.shapes:
            # Norm scales about 1; everything else, biases too, wide enough to matter.
            centre = 1.0 if path.endswith("scale") else 0.0
            shape = shape[::-1] if path.endswith("kernel") else shape
            tensors.setdefault(table[path], rng.normal(centre, 0.15, shape).astype(dtype))
    return tensors


def write_reference(folder: Path, family: str = "llama", **changes):
    """`write_model`, opened by transformers in float32. The test is skipped where there is no PyTorch."""
    float32 = torch.float32
    write_model(folder, family, **changes)
    model_class = getattr(transformers, FAMILIES[family][1])
    model, loading = model_class.from_pretrained(folder, output_loading_info=True, dtype=float32)
    # The names that we wrote are transformers' own, each of them.
    assert not (set(loading["missing_keys"]) | set(loading["unexpected_keys"]) | set(loading["mismatched_keys"]))
    return model.eval()


def logits(model, ids):
    """float32 logits [S, L, vocabulary] of transformers' model, as NumPy."""
    with torch.no_grad():
        return model(torch.as_tensor(ids).long()).logits.numpy()


def our_logits(folder, dtype=jnp.float32, ids=IDS):
    """float32 logits [S, L, vocabulary] of our block-by-block forward on ids [M, B, L]."""
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config, jnp.dtype(dtype))
    check_tensors(checkpoint, model)
    return np.concatenate([np.asarray(batch) for batch in dense.logits(checkpoint, model, ids)])


def assert_same_logits(folder, reference):
    """The checkpoint in `folder` computes what transformers' model computes."""
    np.testing.assert_allclose(our_logits(folder), logits(reference, IDS[0]), atol=1e-4, rtol=0)
