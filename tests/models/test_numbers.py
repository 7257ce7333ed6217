"""Numbers of config.json: absurd ones and odd head sizes are refused in every family, unusual ones computed."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import BASE, LLAMA3, assert_same_logits, our_logits, write_model, write_reference

from barber_jax.console.errors import BarberError
from barber_jax.models import build_model
from barber_jax.models.rope import Rope

ROTARY = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
ABSURD = [1e300, 1.7e308, 1e39, 1e-39, 1e-320, 10**40]


def config_of(family, **changes):
    sizes = {"head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    return {"model_type": family, "max_window_layers": 2, **BASE, **sizes, **changes}


def refused(family, says, **changes):
    with pytest.raises(BarberError, match=says) as error:
        build_model(config_of(family, **changes), jnp.dtype("float32"))
    assert "config.json" in str(error.value)


@ROTARY
# What earlier tests left open, and the garbage collector happens to close within this one, is not its own.
@pytest.mark.filterwarnings("error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")
def test_what_makes_activations_constant_or_not_finite_is_refused(family):
    said = "would make activations constant or not finite"
    for value in (*ABSURD, 1e30, 2.0):
        refused(family, f"rms_norm_eps .*{said}", rms_norm_eps=value)
    for value in ABSURD:
        refused(family, f"rope_theta .*{said}", rope_theta=value)
        refused(family, f"factor .*{said}", rope_scaling={"type": "linear", "factor": value})
        for key in LLAMA3.keys() - {"rope_type"}:
            refused(family, f"{key} .*{said}", rope_scaling=LLAMA3 | {key: value})
    # Each number is possible, but not what they give together.
    said = "radians per position, beyond float32"
    refused(family, said, rope_theta=1e-30)
    for value in (1e-30, 1e38):
        refused(family, said, rope_scaling={"type": "linear", "factor": value})
        refused(family, said, rope_scaling=LLAMA3 | {"factor": value, "original_max_position_embeddings": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1.0},
        {"rms_norm_eps": 1e-12},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.25}},
    ],
)
@pytest.mark.filterwarnings("error:.*:RuntimeWarning")
def test_what_is_unusual_is_computed(tmp_path, changes):
    assert_same_logits(tmp_path, write_reference(tmp_path, **changes))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 10**30])
def test_a_window_beyond_all_positions_is_none(tmp_path, window):
    for name, value in (("all", None), ("window", window)):
        write_model(tmp_path / name, "mistral")
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": value}))
    np.testing.assert_array_equal(our_logits(tmp_path / "window"), our_logits(tmp_path / "all"))


@ROTARY
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (dict(hidden_size=96, num_attention_heads=96, num_key_value_heads=48, head_dim=None), 1),
        (dict(hidden_size=32, num_attention_heads=32, num_key_value_heads=16, head_dim=None), 1),
        (dict(hidden_size=60, num_attention_heads=12, num_key_value_heads=6, head_dim=None), 5),
        (dict(head_dim=15), 15),
    ],
)
def test_odd_head_sizes_are_refused(family, changes, size):
    says = f"the head size (head_dim, or hidden_size / num_attention_heads) is {size}, but rotary positions need"
    refused(family, re.escape(says), **changes)


@ROTARY
def test_heads_that_do_not_divide_are_refused(family):
    refused(family, "hidden_size 66 is not a multiple", hidden_size=66, head_dim=None)
    refused(family, "num_attention_heads 6 is not a multiple", num_attention_heads=6, num_key_value_heads=4)
    refused(family, "hidden_size 32 is not a multiple", num_attention_heads=48, num_key_value_heads=24, head_dim=None)


def test_odd_heads_without_rotary_positions_are_computed(tmp_path):
    assert_same_logits(tmp_path, write_reference(tmp_path, "opt", num_attention_heads=32, hidden_size=96))


def test_an_absurd_even_head_size_takes_no_memory():
    Rope().check(10**30)
