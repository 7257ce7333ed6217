"""A model as one flat dict of parameters: it computes what the model computes, and its arrays are sharded by a rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import IDS, our_logits, write_model
from whole_models import whole

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.models import build_model
from barber_jax.models.sharding import DATA, MODEL
from barber_jax.recovery import program as module
from barber_jax.recovery.program import ALL, Program, axes, load, load_masks


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("opt", {}),
        ("gemma3_text", {}),
        pytest.param("opt", {"word_embed_proj_dim": 16}, marks=pytest.mark.slow),
        pytest.param("mistral", {"sliding_window": 8}, marks=pytest.mark.slow),
        pytest.param("qwen2", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logits_are_those_of_the_pass_block_by_block(family, changes, tiny):
    folder = tiny(family, **changes)
    model = whole(folder)
    program = Program.of(model.model)
    # Every tensor of the checkpoint is one parameter; a tied head has none.
    checkpoint = open_checkpoint(str(folder))
    assert sum(value.size for value in model.dense.values()) == sum(map(checkpoint.size, checkpoint.names()))
    assert program.tied == (("lm_head.kernel", "embed_tokens.embedding") if model.model.tied_embedding else None)
    logits = jax.jit(lambda values, ids: program.logits(values, program.hidden_states(values, {}, ids)))
    np.testing.assert_allclose(logits(model.dense, IDS[0]), our_logits(folder), atol=2e-5, rtol=0)


def test_parameters_keep_the_dtypes_of_the_checkpoint(tmp_path):
    write_model(tmp_path, dtype="bfloat16")
    checkpoint = open_checkpoint(str(tmp_path))
    loaded = load(checkpoint, build_model(checkpoint.config, jnp.dtype("float32")), Devices())
    assert {str(value.dtype) for value in loaded.values()} == {"bfloat16"}


def test_masks_have_the_layout_of_the_kernels(tiny):
    checkpoint = open_checkpoint(str(tiny()))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    parameters = load(checkpoint, model, Devices())
    masks = load_masks(lambda name: checkpoint.read(name) > 0, model, Devices())
    assert tuple(masks) == Program.of(model).kernels
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.asarray(parameters[name]) > 0)


@pytest.mark.parametrize(
    ("name", "shape", "mesh", "expected"),
    [
        # The longest axis that all devices divide; the blocks' axis never.
        ("blocks.a.kernel", (64, 32, 48), (2, 4), (None, None, ALL)),
        ("blocks.a.kernel", (64, 48, 32), (2, 4), (None, ALL)),
        ("blocks.a.kernel", (64, 60, 32), (2, 4), (None, None, ALL)),
        ("embed.a.embedding", (96, 32), (8, 1), (ALL,)),
        # Where they divide none, one of the mesh axes.
        ("blocks.a.kernel", (64, 34, 38), (2, 4), (None, None, DATA)),
        ("blocks.a.kernel", (64, 34, 38), (3, 2), (None, None, MODEL)),
        ("blocks.a.kernel", (64, 33, 37), (2, 4), ()),
        # Too small, and one device.
        ("head.norm.scale", (32,), (2, 4), ()),
        ("blocks.a.kernel", (64, 32, 48), (1, 1), ()),
    ],
)
def test_axes(name, shape, mesh, expected, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 100)
    assert axes(name, shape, mesh) == expected
