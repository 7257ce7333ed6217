"""Gemma 2 and Gemma 3: logits against transformers on random weights for every switch; blocks of two kinds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoints import GEMMA, IDS, assert_same_logits, logits, our_logits, write_model, write_reference

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.forward import passes
from barber_jax.forward.resident import ResidentModel, _hidden_states
from barber_jax.models import build_model

SLIDING, FULL = GEMMA["layer_types"]
LAYOUTS = {
    "gemma2": {
        "alternating": {"layer_types": None, "num_hidden_layers": 3},
        "all_full": {"layer_types": [FULL] * 2},
        "window_1": {"sliding_window": 1},
        "query_scalar": {"query_pre_attn_scalar": 100, "attn_logit_softcapping": None},
        "attention_cap": {"attn_logit_softcapping": 0.5},
        "final_cap": {"final_logit_softcapping": 2.0},
        "no_caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "bias": {"attention_bias": True, "tie_word_embeddings": False},
        "gelu": {"hidden_activation": "gelu"},
    },
    "gemma3_text": {
        "pattern": {"layer_types": None, "sliding_window_pattern": 2, "num_hidden_layers": 3},
        "all_sliding": {"layer_types": [SLIDING] * 2},
        "query_scalar": {"query_pre_attn_scalar": 100, "num_key_value_heads": 1},
        # transformers has the first of these entries and does not use it.
        "caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
        "ropes": {
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
            }
        },
        "one_rope": {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 50.0}, SLIDING: None}},
        "bias": {"attention_bias": True, "tie_word_embeddings": False, "rms_norm_eps": 0.1},
    },
}
ENTRIES = ("vocab_size", "model_type", "architectures")


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]
)
def test_logits_agree_with_transformers(family, layout, tmp_path):
    # Not PyTorch's fused attention, which leaves out the bound of the scores.
    changes = {"attn_implementation": "eager", **LAYOUTS[family][layout]}
    assert_same_logits(tmp_path, write_reference(tmp_path, family, **changes))


def test_older_entries_of_rope(tmp_path):
    ropes = {SLIDING: {"rope_type": "default", "rope_theta": 100.0}}
    ropes[FULL] = {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}
    reference = write_reference(tmp_path, "gemma3_text", rope_parameters=ropes)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    older = {"rope_local_base_freq": 100.0, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    assert_same_logits(tmp_path, reference)


@pytest.mark.parametrize("family", LAYOUTS)
def test_bfloat16_rounds_the_scale_of_embeddings_as_transformers_does(family, tmp_path):
    # The square root of 40 is no bfloat16.
    write_model(tmp_path, family, hidden_size=40, num_attention_heads=4)
    checkpoint = open_checkpoint(str(tmp_path))
    model = build_model(checkpoint.config, jnp.dtype("bfloat16"))
    table = checkpoint.read("model.embed_tokens.weight")
    got = passes.embed(model.embed(), {"embed_tokens.embedding": table}, IDS)[0]
    want = jnp.asarray(table, jnp.bfloat16)[IDS[0]] * jnp.bfloat16(40**0.5)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_two_programs_whatever_the_depth(tmp_path):
    write_model(tmp_path, "gemma3_text", layer_types=None, sliding_window_pattern=3, num_hidden_layers=7)
    model = build_model(json.loads((tmp_path / "config.json").read_text()), jnp.dtype("float32"))
    blocks = model.blocks()
    assert blocks.kinds == (0, 0, 1, 0, 0, 1, 0) and len(blocks.definitions) == 2
    assert blocks[2] == model.block(2) != model.block(0) == blocks[6]
    before = passes.propagate._cache_size()
    streamed = our_logits(tmp_path)
    assert passes.propagate._cache_size() == before + 2
    # The same blocks, stacked and scanned over.
    checkpoint, before = open_checkpoint(str(tmp_path)), _hidden_states._cache_size()
    rows, positions = np.divmod(np.arange(IDS[0].size - 3), IDS.shape[2])
    targets = np.random.default_rng(0).integers(0, 97, rows.shape)
    scores, _ = ResidentModel(checkpoint, model, Devices()).log_likelihoods(IDS[0], rows, positions, targets)
    assert _hidden_states._cache_size() == before + 1
    want = np.asarray(jax.nn.log_softmax(streamed))[rows, positions, targets]
    np.testing.assert_allclose(scores, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", LAYOUTS)
def test_absent_entries_mean_what_transformers_takes_them_for(family, tmp_path):
    write_model(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    bare = {key: config[key] for key in ENTRIES} | {"num_hidden_layers": 7}
    whole = transformers.AutoConfig.for_model(**bare).to_dict() | {"architectures": bare["architectures"]}
    ours, said = build_model(bare, jnp.dtype("float32")), build_model(whole, jnp.dtype("float32"))
    assert ours.positions == said.positions == whole["max_position_embeddings"]
    assert (ours.names, ours.tied_embedding) == (said.names, said.tied_embedding)
    assert ours.embed() == said.embed() and ours.head() == said.head() and ours.blocks() == said.blocks()


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"layer_types": [SLIDING, "chunked_attention"]}, "layer_types must be a list of 2"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window"),
        ("gemma3_text", {"max_position_embeddings": "64"}, "max_position_embeddings"),
        ("gemma2", {"max_position_embeddings": [64]}, "max_position_embeddings"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters of gemma3"),
        ("gemma3_text", {"rope_parameters": {FULL: 3}}, f"{FULL} must be an object"),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, "dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": "high"}, "attn_logit_softcapping"),
        ("gemma2", {"head_dim": 7}, "even"),
        ("gemma2", {"model_type": "gemma"}, "'gemma' is not supported"),
        ("gemma2", {"model_type": "gemma3n"}, "'gemma3n' is not supported"),
        ("gemma2", {"model_type": "paligemma"}, "'paligemma' is not supported"),
        ("gemma2", {"model_type": "recurrent_gemma"}, "'recurrent_gemma' is not supported"),
        ("gemma2", {"model_type": "siglip_vision_model"}, "'siglip_vision_model' is not supported"),
        ("gemma2", {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "text_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, change, said, tiny):
    config = json.loads((tiny(family) / "config.json").read_text()) | change
    with pytest.raises(BarberError, match=said):
        build_model(config, jnp.dtype("float32"))


def test_bounded_scores_in_generation(tiny):
    import barber_jax

    folder = tiny("gemma2", attn_logit_softcapping=0.5)
    module, _ = barber_jax.load(folder)
    (made,) = barber_jax.generate(module, IDS[0][:1, :20], tokens=3)
    ids = np.concatenate([IDS[0][0, :20], made])[None, None]
    np.testing.assert_array_equal(made, our_logits(folder, ids=ids)[0].argmax(-1)[19:22])


def test_transformers_shows_the_bound(tmp_path):
    """The layouts above would agree just as well if neither side had a bound."""
    reference = write_reference(tmp_path, "gemma2", final_logit_softcapping=2.0)
    assert np.abs(logits(reference, IDS[0])).max() < 2.0
