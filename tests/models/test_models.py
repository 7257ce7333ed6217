"""Logits against transformers on random weights, for every head layout and switch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import IDS, LLAMA3, assert_same_logits, logits, our_logits, write_model, write_reference
from flax import nnx

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import read_parameters, to_flax, to_hf
from barber_jax.models import build_model
from barber_jax.models.decoder import GatedMLP, nested
from barber_jax.models.rope import Rope

LAYOUTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "epsilon": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_logits_agree_with_transformers(layout, tmp_path):
    reference = write_reference(tmp_path, **LAYOUTS[layout])
    assert_same_logits(tmp_path, reference)


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 500.0}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_scaling": LLAMA3}],
    ids=["theta", "linear", "llama3"],
)
def test_old_spelling_of_rope(rope, tmp_path):
    scaling = rope.get("rope_scaling", {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    new = {"rope_theta": rope.get("rope_theta", 10000.0), **scaling, "rope_type": kind}
    reference = write_reference(tmp_path, rope_parameters={k: v for k, v in new.items() if k != "type"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | rope))
    assert_same_logits(tmp_path, reference)


def test_bfloat16_compute_is_close(tmp_path):
    reference = logits(write_reference(tmp_path), IDS[0])
    error = np.abs(our_logits(tmp_path, jnp.bfloat16) - reference)
    # bfloat16 has 8 bits of mantissa: parts in 256, through two blocks.
    assert error.mean() < 0.02 * np.abs(reference).mean() * 4
    assert error.mean() > 0


def test_whole_decoder_equals_the_streamed_forward(tmp_path):
    reference = write_reference(tmp_path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(tmp_path))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    flat = {f"embed.{k}": v for k, v in read_parameters(checkpoint, model.names.embed).items()}
    # The head is the embedding, and the decoder has one parameter for both.
    flat["head.norm.scale"] = checkpoint.read("model.norm.weight")
    for index in range(model.layers):
        table = model.names.of_block(index)
        flat |= {f"layers.{index}.{k}": v for k, v in read_parameters(checkpoint, table).items()}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model.decoder(nnx.Rngs(0))))
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)} == set(flat)
    got = jax.jit(nnx.merge(graphdef, nested(flat)))(IDS[0])
    np.testing.assert_allclose(np.asarray(got), logits(reference, IDS[0]), atol=1e-4, rtol=0)


def test_name_table_covers_transformers_names_and_goes_both_ways(tmp_path):
    reference = write_reference(tmp_path, attention_bias=True, mlp_bias=True)
    model = build_model(json.loads((tmp_path / "config.json").read_text()), jnp.dtype("float32"))
    tables = [model.names.embed, model.names.head, *(model.names.of_block(i) for i in range(model.layers))]
    assert {name for table in tables for name in table.values()} == set(reference.state_dict())
    for table in tables:
        assert len(set(table.values())) == len(table)
        for path, name in table.items():
            tensor = reference.state_dict()[name].numpy()
            np.testing.assert_array_equal(to_hf(path, to_flax(path, tensor)), tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "phi3"}, "phi3"),
        ({"model_type": None}, "None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"attention_bias": "no"}, "attention_bias"),
        # transformers computes attention in both directions, for null too.
        ({"is_causal": False}, "is_causal False: attention in both directions is not supported"),
        ({"is_causal": None}, "is_causal None"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, said, tmp_path):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(BarberError, match=said):
        build_model(config, jnp.dtype("float32"))


def test_llama3_frequencies_against_the_three_regimes():
    rope = Rope.from_hf({"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}})
    plain = Rope().inverse_frequencies(64)
    scaled = rope.inverse_frequencies(64)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8], plain[wavelength < 8])
    np.testing.assert_allclose(scaled[wavelength > 32], plain[wavelength > 32] / 8, rtol=1e-6)
    between = (wavelength > 8) & (wavelength < 32)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all() and between.any()


def test_gradients_of_linears_transpose_no_activations():
    """On a CPU, XLA copies [in, tokens] and [out, tokens] for the gradient of `lax.dot_general` of [S, L, in]."""
    inputs, inner, shape = 16, 40, (2, 12, 16)
    definition, parameters = nnx.split(GatedMLP(inputs, inner, "silu", False, jnp.float32, nnx.Rngs(0)))

    def loss(parameters, x):
        return jnp.sum(nnx.merge(definition, parameters)(x, lambda name, value: None) ** 2)

    program = jax.jit(jax.grad(loss)).lower(parameters, jnp.ones(shape)).compile().as_text()
    assert f"f32[24,{inner}]" in program
    assert not [size for size in (inputs, inner) if f"f32[{size},24]" in program or f"f32[{size},2,12]" in program]
