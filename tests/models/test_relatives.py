"""LLaMA's relatives: logits against transformers on random weights, and a pruning from end to end."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoints import IDS, assert_same_logits, logits, our_logits, write_model, write_reference
from cli import prune_masks

from barber_jax.console.errors import BarberError
from barber_jax.models import build_model

SLIDING = {"use_sliding_window": True, "sliding_window": 7}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
    }
}
LAYOUTS = [
    *((family, YARN) for family in ("llama", "mistral", "qwen2", "qwen3")),
    ("qwen2", {"rope_parameters": YARN["rope_parameters"] | {"attention_factor": 0.6, "truncate": False}}),
    ("mistral", {}),
    ("mistral", {"num_key_value_heads": 4}),
    ("mistral", {"head_dim": 24}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen2", {**SLIDING, "max_window_layers": 0}),
    ("qwen2", {**SLIDING, "max_window_layers": 2}),
    ("qwen2", {**SLIDING, "layer_types": ["sliding_attention"] * 2}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {**SLIDING, "max_window_layers": 0, "num_key_value_heads": 4}),
]
ENTRIES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def name(value):
    return value if isinstance(value, str) else ",".join(value) or "plain"


@pytest.mark.parametrize(("family", "changes"), LAYOUTS, ids=name)
def test_logits_agree_with_transformers(family, changes, tmp_path):
    assert_same_logits(tmp_path, write_reference(tmp_path, family, **changes))


def test_a_window_changes_the_logits_behind_it_only(tmp_path):
    write_model(tmp_path / "all", "mistral", sliding_window=None)
    write_model(tmp_path / "window", "mistral", sliding_window=7)
    change = np.abs(our_logits(tmp_path / "all") - our_logits(tmp_path / "window")).max(axis=(0, 2))
    assert change[:7].max() < 1e-5 and change[7:].min() > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "qwen2", "qwen3"])
def test_pruned_end_to_end_and_loaded_by_transformers(family, tmp_path):
    write_model(tmp_path / "dense", family)
    np.save(tmp_path / "ids.npy", IDS[0])
    out = tmp_path / "out"
    masks = prune_masks(out, tmp_path / "dense", tmp_path / "ids.npy", "--samples", 3, "--length", 40)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    state = pruned.state_dict()
    # Everything but embeddings, norms, biases and head: 4 attention weights and 2 or 3 of the MLP a block.
    assert len(masks) == 2 * (6 if family == "opt" else 7)
    for weight, mask in masks.items():
        assert (mask.sum(axis=1) == mask.shape[1] // 2).all()
        np.testing.assert_array_equal(state[weight].numpy() != 0, mask)
    np.testing.assert_allclose(our_logits(out), logits(pruned, IDS[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "opt", "qwen2", "qwen3"])
def test_absent_entries_mean_what_transformers_takes_them_for(family, tmp_path):
    write_model(tmp_path, family, num_attention_heads=32, hidden_size=64)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = (*ENTRIES, "ffn_dim", "model_type", "architectures")
    bare = {key: value for key, value in config.items() if key in kept}
    whole = transformers.AutoConfig.for_model(**bare).to_dict() | {"architectures": bare["architectures"]}
    ours, said = build_model(bare, jnp.dtype("float32")), build_model(whole, jnp.dtype("float32"))
    assert ours.positions == said.positions == whole["max_position_embeddings"]
    assert (ours.names, ours.tied_embedding) == (said.names, said.tied_embedding)
    # A definition holds every shape and switch of the block, the window and the rotary base among them.
    assert ours.embed() == said.embed() and ours.head() == said.head() and ours.block() == said.block()


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("mistral", {"sliding_window": "4k"}, "sliding_window must be a positive integer"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen2", {**SLIDING, "layer_types": None, "max_window_layers": 1}, "layer_types must be full_attention"),
        ("qwen2", {**SLIDING, "layer_types": None, "max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types must be a list of 2"),
        ("qwen3", {"head_dim": 0}, "head_dim"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "only Qwen3ForCausalLM"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, change, said, tmp_path):
    write_model(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(BarberError, match=said):
        build_model(config, jnp.dtype("float32"))
