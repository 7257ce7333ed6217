"""OPT in both layouts: logits against transformers, and the rebuild of post-norm blocks against plain JAX."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import IDS, assert_same_logits, write_model, write_reference
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import read_parameters, to_flax, to_hf
from barber_jax.models import build_model
from barber_jax.stages import gradients
from barber_jax.stages.loss import advance

POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
LAYOUTS = {
    "pre_norm": {},
    "post_norm": POST_NORM,
    "post_norm_without_projection": {"do_layer_norm_before": False},
    "pre_norm_with_projection": {"word_embed_proj_dim": 20},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "untied_post_norm": {**POST_NORM, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_agree_with_transformers(layout, tmp_path):
    assert_same_logits(tmp_path, write_reference(tmp_path, "opt", **LAYOUTS[layout]))


def test_checkpoint_whose_names_lack_the_leading_model(tmp_path):
    reference = write_reference(tmp_path, "opt")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert_same_logits(tmp_path, reference)


@pytest.mark.parametrize("layout", ["untied", "untied_post_norm"])
def test_name_table_covers_transformers_names_and_goes_both_ways(layout, tmp_path):
    state = write_reference(tmp_path, "opt", **LAYOUTS[layout]).state_dict()
    model = build_model(json.loads((tmp_path / "config.json").read_text()), jnp.dtype("float32"))
    tables = [model.names.embed, model.names.head, *(model.names.of_block(i) for i in range(model.layers))]
    assert {name for table in tables for name in table.values()} == set(state)
    for table in tables:
        for path, name in table.items():
            tensor = state[name].numpy()
            np.testing.assert_array_equal(to_hf(path, to_flax(path, tensor)), tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "quick_gelu"}, "activation_function"),
        ({"ffn_dim": None}, "ffn_dim is missing"),
        ({"word_embed_proj_dim": "20"}, "word_embed_proj_dim"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"do_layer_norm_before": "no"}, "do_layer_norm_before"),
        ({"enable_bias": 1}, "enable_bias"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, said, tmp_path):
    write_model(tmp_path, "opt")
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(BarberError, match=said):
        build_model(config, jnp.dtype("float32"))


# Post-norm OPT once more, from the equations alone: weights [out, in] by their Hugging Face names, no Flax.


def affine(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_self_attention(weights, x, heads=4):
    """[L, D] -> [L, D], head by head."""
    q, k, v = (affine(weights, f"self_attn.{part}_proj", x) for part in "qkv")
    visible = np.tril(np.ones((len(x), len(x)), bool))
    mixed = []
    for part in np.split(np.arange(x.shape[1]), heads):
        scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
        mixed.append(jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v[:, part])
    return affine(weights, "self_attn.out_proj", jnp.concatenate(mixed, axis=1))


def plain_mlp(weights, x):
    return affine(weights, "fc2", jnp.maximum(affine(weights, "fc1", x), 0))


def plain_norm(weights, name, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


PLAIN = {
    "self_attn": (
        plain_self_attention,
        "self_attn_layer_norm",
        [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")],
    ),
    "mlp": (plain_mlp, "final_layer_norm", ["fc1", "fc2"]),
}


def plain_importance(apply, weights, sparse, pruned, samples):
    """D [out, in] of every pruned weight, and the mean loss, sample by sample."""

    def loss(some, x):
        return jnp.mean((apply({**weights, **some}, x) - apply(sparse, x)) ** 2)

    dense = {name: weights[name] for name in pruned}
    gradients = [jax.grad(loss)(dense, x) for x in samples]
    root = {name: np.sqrt(np.mean([np.square(g[name]) for g in gradients], axis=0)) for name in pruned}
    return root, np.mean([loss(dense, x) for x in samples])


def test_rebuild_of_post_norm_blocks_equals_a_plain_recomputation(tmp_path):
    write_model(tmp_path, "opt", **POST_NORM)
    checkpoint = open_checkpoint(str(tmp_path))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    tensors = load_file(tmp_path / "model.safetensors")
    decoder = "model.decoder."
    embedded = tensors[f"{decoder}embed_tokens.weight"][IDS[0]] @ tensors[f"{decoder}project_in.weight"].T
    hidden = embedded + tensors[f"{decoder}embed_positions.weight"][2 : 2 + IDS.shape[2]]
    stream, random = jnp.asarray(hidden)[None], np.random.default_rng(1)
    for index in range(model.layers):
        prefix = f"{decoder}layers.{index}."
        weights = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
        table = model.names.of_block(index)
        parameters = {path: jnp.asarray(value) for path, value in read_parameters(checkpoint, table).items()}
        for sub in model.sub_blocks:
            apply, norm, linears = PLAIN[sub.name]
            masks = {path: random.random(parameters[path].shape[::-1]) < 0.5 for path in sub.kernels}
            pruned = {path: table[path].removeprefix(prefix) for path in sub.kernels}
            assert sorted(pruned.values()) == sorted(f"{linear}.weight" for linear in linears)
            sparse = weights | {pruned[path]: np.where(mask, weights[pruned[path]], 0) for path, mask in masks.items()}
            want, want_loss = plain_importance(apply, weights, sparse, pruned.values(), hidden)
            dense_out = np.stack([apply(weights, x) for x in hidden])

            totals = gradients.zero_totals(model.block(), sub)
            totals, dense = gradients.accumulate(model.block(), sub, parameters, {}, masks, stream, totals)
            got, loss = gradients.importance(sub, totals, jnp.float32(len(hidden)))
            np.testing.assert_allclose(loss, want_loss, rtol=1e-4)
            np.testing.assert_allclose(dense[0], dense_out, atol=1e-4)
            for path, name in pruned.items():
                np.testing.assert_allclose(got[path].T, want[name], rtol=1e-3, atol=1e-4 * want[name].max())
            stream, _ = advance(model.block(), sub, parameters, masks, dense, stream)
            hidden = np.stack([plain_norm(weights, norm, x + apply(sparse, x)) for x in hidden])
            np.testing.assert_allclose(stream[0], hidden, atol=1e-4)
