"""Refinement as a stage."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from base_contract import COMMON, contents
from cli import agreement, interrupted_after, prune_masks
from stage_contract import StageContract

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.models import build_model
from barber_jax.run.dense_gradients import scaled
from barber_jax.run.gradient_file import TOKENS
from barber_jax.stages import layerwise

BY_GRADIENT = ("--no-rebuild", "--refine", 5, "--refine-weighting", "gradient")


class TestRefine(StageContract):
    stage = "refine"
    options = ("--no-rebuild", "--refine", 5, "--token-weighting", "norm")
    # A near-tie is decided otherwise by rounding, and what is swapped after it follows.
    mesh_agreement = 0.99


def test_given_weights_of_tokens_enter_the_gram_matrix(tiny):
    model = build_model(json.loads((tiny() / "config.json").read_text()), jnp.dtype("float32"))
    block, rng = model.block(), np.random.default_rng(0)
    sub = model.sub_blocks[0]
    parameters = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in block.shapes}
    stream = jnp.asarray(rng.normal(size=(2, 1, 6, model.hidden)), jnp.float32)
    weights = rng.gamma(1.0, size=(2, 1, 6)).astype(np.float32)
    gram = layerwise.gram(block, sub, "self_attn.in", parameters, {}, stream, stream, "norm", jnp.asarray(weights))
    bound = block.bind(parameters)
    x = np.stack([np.asarray(bound.enter("self_attn", batch), np.float64) for batch in stream]).reshape(12, -1)
    np.testing.assert_allclose(gram, (x * weights.reshape(12, 1)).T @ x, rtol=1e-5, atol=1e-4)


def test_weights_have_a_mean_of_1():
    weights = np.random.default_rng(0).gamma(0.1, size=(4, 8)).astype(np.float32) * np.float32(1e-12)
    np.testing.assert_allclose(scaled(weights), weights / weights.mean(dtype=np.float64), rtol=1e-6)
    assert (scaled(np.zeros((2, 3), np.float32)) == 1).all()


def test_weighting_by_gradients(tiny, tiny_ids, tmp_path):
    """Other masks of the same sparsity; resumed, with its sweep kept, to the same bytes."""

    def masks(name, *options):
        return prune_masks(tmp_path / name, tiny(), tiny_ids, *COMMON, *options)

    plain = masks("plain", *BY_GRADIENT[:3])
    whole = masks("whole", *BY_GRADIENT)
    assert 0.8 < agreement(plain, whole) < 1
    assert all((mask.sum(1) == plain[name].sum(1)).all() for name, mask in whole.items())
    with interrupted_after(1):
        masks("resumed", *BY_GRADIENT)
    assert (tmp_path / "resumed.run" / TOKENS).exists()
    with pytest.raises(BarberError, match="--seed was 0 in the run"):
        masks("resumed", *BY_GRADIENT, "--resume", "--seed", 1)
    masks("resumed", *BY_GRADIENT, "--resume")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--mesh", "data=2,model=2"), ("--offload-activations", "--batch", 2)], ids=["mesh", "offloaded"]
)
def test_weighting_by_gradients_on_a_mesh_and_offloaded(options, tiny, tiny_ids, tmp_path):
    given = (*COMMON, *BY_GRADIENT, "--method", "gblm", "--pattern", "2:4")
    one = prune_masks(tmp_path / "one", tiny("opt"), tiny_ids, *given)
    other = prune_masks(tmp_path / "other", tiny("opt"), tiny_ids, *given, *options)
    assert agreement(one, other) >= TestRefine.mesh_agreement
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in other.values())


def test_bad_options():
    with pytest.raises(BarberError, match="--refine-weighting gradient needs --refine"):
        PruneConfig(ckpt="dense", out="out", refine_weighting="gradient")
