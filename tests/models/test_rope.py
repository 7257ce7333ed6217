"""Rotary settings in every spelling of config.json: what transformers makes of them, or a refusal."""

import copy
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from checkpoints import BASE, torch

from barber_jax.console.errors import BarberError
from barber_jax.models import build_model, llama
from barber_jax.models.rope import Rope

HEAD = 16
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_64 = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 32}
LINEAR = {"type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}


def llama3(theta: float, original: float) -> Rope:
    return Rope(theta, "llama3", 8.0, 1.0, 4.0, original)


# Entries of config.json -> the settings, the same in every family.
SPELLINGS = {
    "nothing": ({}, Rope()),
    "theta": ({"rope_theta": 5e5}, Rope(5e5)),
    "theta inside": ({"rope_parameters": DEFAULT}, Rope(5e5)),
    "theta inside wins": ({"rope_theta": 2e4, "rope_parameters": DEFAULT}, Rope(5e5)),
    "theta beside": ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, Rope(5e5)),
    "null theta beside": ({"rope_theta": None, "rope_parameters": DEFAULT}, Rope(5e5)),
    "null": ({"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None}, Rope(5e5)),
    "empty scaling": ({"rope_scaling": {}, "rope_parameters": DEFAULT}, Rope(5e5)),
    "scaling": ({"rope_theta": 2e4, "rope_scaling": LINEAR}, Rope(2e4, "linear", 4.0)),
    "scaling without type": ({"rope_scaling": {"factor": 4.0}}, Rope()),
    "scaling wins": ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, Rope(1e4, "linear", 4.0)),
    "scaling wins, theta beside": (
        {"rope_theta": 2e4, "rope_scaling": LINEAR, "rope_parameters": DEFAULT},
        Rope(2e4, "linear", 4.0),
    ),
    "scaling wins over llama3": ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3_64}, Rope(1e4, "linear", 4.0)),
    "default scaling wins": ({"rope_scaling": DEFAULT, "rope_parameters": LINEAR}, Rope(5e5)),
    "theta inside scaling": ({"rope_theta": 2e4, "rope_scaling": LINEAR | {"rope_theta": 5e5}}, Rope(5e5, "linear", 4)),
    "rope_type wins": ({"rope_scaling": LLAMA3_64 | {"type": "linear"}}, llama3(1e4, 32)),
    "rope_type default wins": ({"rope_scaling": LINEAR | {"rope_type": "default"}}, Rope()),
    "type is read": ({"rope_scaling": {"type": "llama3", **LLAMA3}}, llama3(1e4, 64)),
    "original positions default to all": ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, llama3(1e4, 64)),
    "original positions beside win": (
        {"rope_scaling": LLAMA3_64, "original_max_position_embeddings": 16},
        llama3(1e4, 16),
    ),
    "original positions of a fraction": (
        {"rope_scaling": LLAMA3_64 | {"original_max_position_embeddings": 40.5}},
        llama3(1e4, 40.5),
    ),
    "partial of 1": ({"rope_scaling": LINEAR, "partial_rotary_factor": 1.0}, Rope(1e4, "linear", 4.0)),
    "unknown entry": ({"rope_parameters": DEFAULT | {"mrope_section": [2, 3, 3]}}, Rope(5e5)),
}


def config(family, entries):
    # A copy: transformers fills in what is absent in the very dicts that it is given.
    return {**BASE, "model_type": family, "head_dim": HEAD, **copy.deepcopy(entries)}


def settings(family, entries, monkeypatch) -> Rope:
    """The settings with which `family`'s model is built."""
    kept = []
    monkeypatch.setattr(llama.Rope, "from_hf", lambda raw, read=Rope.from_hf: kept.append(read(raw)) or kept[0])
    build_model(config(family, entries), jnp.dtype("float32"))
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(family, spelling, monkeypatch):
    entries, wanted = SPELLINGS[spelling]
    assert settings(family, entries, monkeypatch) == wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_transformers_reads_every_spelling_alike(family, spelling):
    assert torch.float32
    entries, ours = SPELLINGS[spelling]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    theirs = getattr(module, f"{FAMILIES[family]}RotaryEmbedding")(
        transformers.AutoConfig.for_model(**config(family, entries))
    )
    assert theirs.attention_scaling == 1
    np.testing.assert_array_equal(ours.inverse_frequencies(HEAD), theirs.inv_freq.numpy())


@pytest.mark.parametrize(
    ("default", "family"), [(2048, "llama"), (131072, "mistral"), (32768, "qwen2"), (32768, "qwen3")]
)
def test_original_positions_default_to_the_familys(default, family, monkeypatch):
    monkeypatch.delitem(BASE, "max_position_embeddings")
    assert settings(family, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, monkeypatch) == llama3(1e4, default)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        # Added by hand beside what transformers 5 has written.
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": DEFAULT}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 4.0}}, "rope type None"),
        ({"rope_theta": None}, "rope_theta must be .* not None"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": None}}, "rope_theta must be .* not None"),
        ({"rope_scaling": LINEAR | {"factor": None}}, "factor must be .* not None"),
        ({"rope_scaling": LLAMA3_64, "original_max_position_embeddings": None}, "original_max_.* not None"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "for full_attention alone are not supported; write one set"),
        ({"rope_scaling": {"full_attention": None}, "rope_parameters": DEFAULT}, "for full_attention alone"),
        ({"rope_parameters": DEFAULT | {"sliding_attention": DEFAULT}}, "for sliding_attention alone"),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": []}, "must be an object, not \\[\\]"),
        ({"rope_scaling": LINEAR, "rope_parameters": "x"}, "must be an object, not 'x'"),
    ],
)
def test_what_is_refused(family, entries, said):
    with pytest.raises(BarberError, match=said):
        build_model(config(family, entries), jnp.dtype("float32"))
