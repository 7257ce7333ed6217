"""Gemma in .gguf files: the model is the one that was converted, its settings those that llama.cpp computes with."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoints import BASE, GEMMA, assert_same_logits, write_reference
from safetensors.numpy import load_file
from test_gguf import add_field, finish

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.models import build_model

SIZES = {**BASE, "head_dim": 12, "layer_types": None, "sliding_window": 7}
ARCHITECTURES = {
    "gemma2": ("gemma2", {**SIZES, "num_hidden_layers": 3}),
    "gemma3_text": ("gemma3", {**SIZES, "num_hidden_layers": 7}),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def fields_of(architecture, sizes, **changes):
    fields = {
        "block_count": sizes["num_hidden_layers"],
        "context_length": sizes["max_position_embeddings"],
        "embedding_length": sizes["hidden_size"],
        "feed_forward_length": sizes["intermediate_size"],
        "attention.head_count": sizes["num_attention_heads"],
        "attention.head_count_kv": sizes["num_key_value_heads"],
        "attention.key_length": sizes["head_dim"],
        "attention.value_length": sizes["head_dim"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": sizes["sliding_window"],
        **changes,
    }
    given = {f"{architecture}.{key}": value for key, value in fields.items() if value is not None}
    return given | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}


def write(path, architecture, hf, fields):
    """What llama.cpp's converter makes of Hugging Face's tensors: 1 added to the norms, nothing reordered."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, value in hf.items():
        inner = name.removeprefix("model.").removesuffix(".weight")
        if inner.startswith("layers."):
            _, layer, part = inner.split(".", 2)
            stored = f"blk.{layer}.{NAMES[part]}.weight"
        else:
            stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[inner] + ".weight"
        writer.add_tensor(stored, value + np.float32(1) if name.endswith("norm.weight") else value)
    return finish(writer, path)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_gives_back_the_hugging_face_model(family, tmp_path):
    architecture, sizes = ARCHITECTURES[family]
    # llama.cpp scales the scores by the head size, where the model is not the largest.
    reference = write_reference(tmp_path / "hf", family, **sizes, query_pre_attn_scalar=sizes["head_dim"])
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    path = write(tmp_path / "m.gguf", architecture, hf, fields_of(architecture, sizes))
    assert_same_logits(path, reference)
    checkpoint = open_checkpoint(str(path))
    for name, tensor in hf.items():
        np.testing.assert_allclose(checkpoint.read(name), tensor, atol=2e-7)
    # transformers makes the same of the configuration as we do.
    built = transformers.AutoConfig.for_model(**checkpoint.config)
    ours, said = (build_model(config, jnp.dtype("float32")) for config in (checkpoint.config, built.to_dict()))
    assert ours.blocks() == said.blocks() and ours.head() == said.head() and ours.positions == said.positions


@pytest.mark.parametrize(
    ("family", "changes", "entries"),
    [
        ("gemma2", {}, {"rope_theta": 1e4, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("gemma2", {"attn_logit_softcapping": 9.0}, {"attn_logit_softcapping": 9.0}),
        ("gemma2", {"block_count": 46}, {"query_pre_attn_scalar": 8}),
        ("gemma3_text", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 12}),
        ("gemma3_text", {"final_logit_softcapping": 9.0}, {"final_logit_softcapping": 9.0}),
        ("gemma3_text", {"block_count": 62}, {"query_pre_attn_scalar": 8}),
        (
            "gemma3_text",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 500.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 500.0},
        ),
    ],
)
def test_settings(family, changes, entries):
    from barber_jax.convert.gguf_gemma import gemma_config

    architecture, sizes = ARCHITECTURES[family]
    config = gemma_config(architecture, fields_of(architecture, sizes, **changes), 97)
    assert {key: config[key] for key in entries} == entries


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_count": 8}, "gemma3.expert_count = 8"),
        ({"attention.scale": 0.5}, "gemma3.attention.scale = 0.5"),
        ({"attention.key_length": 11}, "11 is odd"),
        ({"block_count": None}, "gemma3.block_count is missing"),
        ({"block_count": 10**6}, "gemma3.block_count is 1000000, more than there are tensors"),
        ({"embedding_length": 48}, "token_embd.weight has shape"),
    ],
)
def test_refused_by_name(changes, said, tmp_path, tiny):
    hf = load_file(tiny("gemma3_text") / "model.safetensors")
    path = write(tmp_path / "m.gguf", "gemma3", hf, fields_of("gemma3", GEMMA, **changes))
    with pytest.raises(BarberError, match=said):
        open_checkpoint(str(path))


def test_a_missing_norm_and_a_strange_tensor(tmp_path, tiny):
    hf = load_file(tiny("gemma3_text") / "model.safetensors")
    name = "model.layers.1.self_attn.q_norm.weight"
    path = write(tmp_path / "m.gguf", "gemma3", {key: hf[key] for key in hf if key != name}, fields_of("gemma3", GEMMA))
    with pytest.raises(BarberError, match=r"blk\.1\.attn_q_norm\.weight is missing"):
        open_checkpoint(str(path))
    path = write(tmp_path / "2.gguf", "gemma2", hf, fields_of("gemma2", GEMMA))
    with pytest.raises(BarberError, match=r"attn_k_norm\.weight is not part of a gemma2 model"):
        open_checkpoint(str(path))
