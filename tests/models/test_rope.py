"""Rotary settings in every spelling of config.json: what transformers makes of them, or a refusal."""

import copy
import importlib
import math
from dataclasses import replace

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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def yarn(theta: float, attention_factor: float, factor: float = 4.0, **more) -> Rope:
    return Rope(theta, "yarn", factor, original_positions=32, attention_factor=attention_factor, **more)


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
    "yarn": ({"rope_theta": 1e6, "rope_scaling": YARN}, yarn(1e6, 0.1 * math.log(4) + 1)),
    "yarn by hand": ({"rope_scaling": YARN, "rope_parameters": DEFAULT}, yarn(1e4, 0.1 * math.log(4) + 1)),
    "yarn inside": ({"rope_parameters": YARN | {"rope_theta": 5e5}}, yarn(5e5, 0.1 * math.log(4) + 1)),
    "yarn without original": (
        {"rope_scaling": {"type": "yarn", "factor": 2.5}},
        replace(yarn(1e4, 0.1 * math.log(2.5) + 1, 2.5), original_positions=64),
    ),
    "yarn, original beside": (
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        replace(yarn(1e4, 0.1 * math.log(4) + 1), original_positions=16),
    ),
    "yarn, factor null": ({"rope_scaling": YARN | {"factor": None}}, yarn(1e4, 0.1 * math.log(2) + 1, 2.0)),
    "yarn, factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, yarn(1e4, 1.0, 0.5)),
    "yarn, attention": ({"rope_scaling": YARN | {"attention_factor": 0.8, "mscale": 2}}, yarn(1e4, 0.8)),
    "yarn, mscale": (
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        yarn(1e4, (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)),
    ),
    "yarn, one mscale": ({"rope_scaling": YARN | {"mscale": 0.7}}, yarn(1e4, 0.1 * math.log(4) + 1)),
    "yarn, betas": (
        {"rope_scaling": YARN | {"beta_fast": 3.5, "beta_slow": 0.25, "truncate": False}},
        yarn(1e4, 0.1 * math.log(4) + 1, fast=3.5, slow=0.25, truncate=False),
    ),
    "yarn, betas of 0 and null": (
        {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None, "attention_factor": None}},
        yarn(1e4, 0.1 * math.log(4) + 1),
    ),
    "yarn, betas alike": (
        {"rope_scaling": YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False}},
        yarn(1e4, 0.1 * math.log(4) + 1, fast=2.0, slow=2.0, truncate=False),
    ),
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
    assert theirs.attention_scaling == pytest.approx(ours.attention_factor, rel=1e-15)
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
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": DEFAULT},
            "'dynamic' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs 'factor'"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "'yarn' with rope_theta 1 and"),
        ({"rope_scaling": YARN | {"attention_factor": 1e30}}, "attention factor of 1e\\+30"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor must be"),
        ({"rope_scaling": YARN | {"mscale": 1e9, "mscale_all_dim": 1e-9}}, "an attention factor of 1.38"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast must be"),
        ({"rope_scaling": YARN | {"beta_slow": "x"}}, "beta_slow must be"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate must be true or false"),
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
