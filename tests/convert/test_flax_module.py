"""A whole model as a Flax module with masks, loaded from a checkpoint and written back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from checkpoints import FAMILIES, IDS, logits, torch, write_model
from flax import nnx
from safetensors.numpy import load_file, save_file

import barber_jax
from barber_jax import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import FolderWriter
from barber_jax.masks import read_masks
from barber_jax.models import build_model

MASKS = "masks.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
UP_PATH = "layers.0.mlp.up_proj.kernel"


def model_of(checkpoint):
    return build_model(checkpoint.config, jnp.dtype("float32"))


def write_pruned(out, source, pattern="unstructured", sparsity=0.5):
    """A pruned copy of a checkpoint, with random masks; a few kept weights are 0 too."""
    checkpoint, rng = open_checkpoint(str(source)), np.random.default_rng(0)
    names = model_of(checkpoint).pruned_names()
    with FolderWriter(out, checkpoint, names, pattern, sparsity) as writer:
        for name in names:
            weight = checkpoint.read(name)
            if pattern == "unstructured":
                mask = rng.random(weight.shape) >= sparsity
            else:
                mask = (rng.random((*weight.shape[:1], weight.shape[1] // 4, 4)).argsort(-1) < 2).reshape(weight.shape)
            weight[:, 0] = 0
            writer.write_pruned(name, weight, mask)
        writer.finish(set(names))
        writer.publish()
    return out


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny):
    return write_pruned(tmp_path_factory.mktemp("pruned") / "llama", tiny())


def flat(tree):
    """Path -> leaf of nested dicts."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}


def parameters(module):
    return flat(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def transformers_logits(folder):
    float32 = torch.float32
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=float32, output_loading_info=True)
    assert not any(loading.values())
    return logits(model.eval(), IDS[0])


def run(module):
    return np.asarray(nnx.jit(lambda module, ids: module(ids))(module, IDS[0]))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_computes_what_transformers_does_and_goes_back(tmp_path, family, tied):
    write_model(tmp_path / "dense", family, tie_word_embeddings=tied)
    source = write_pruned(tmp_path / "pruned", tmp_path / "dense")
    module, masks = barber_jax.load(source)
    assert flat(masks).keys() == parameters(module).keys()
    names = {name for name, mask in flat(masks).items() if np.ndim(mask)}
    assert len(names) == len(model_of(open_checkpoint(str(source))).pruned_names())
    np.testing.assert_allclose(run(module), transformers_logits(source), atol=1e-4, rtol=0)

    barber_jax.save(module, masks, tmp_path / "again")
    assert (tmp_path / "again" / MASKS).read_bytes() == (source / MASKS).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].view(np.uint8), tensor.view(np.uint8))
    np.testing.assert_array_equal(transformers_logits(tmp_path / "again"), transformers_logits(source))


def test_masks_are_the_files_in_the_kernels_layout(pruned):
    module, masks = barber_jax.load(pruned)
    file, kernels = read_masks(pruned), parameters(module)
    np.testing.assert_array_equal(flat(masks)[UP_PATH], file.read(UP).T)
    for path, mask in flat(masks).items():
        assert np.ndim(mask) == 0 or not np.asarray(kernels[path])[~mask].any()


def test_without_a_file_masks_are_the_zeros(pruned, tmp_path, tiny):
    copy = shutil.copytree(pruned, tmp_path / "copy")
    (copy / MASKS).unlink()
    _, masks = barber_jax.load(copy)
    file = read_masks(pruned)
    without_column = file.read(UP)
    without_column[:, 0] = False
    np.testing.assert_array_equal(flat(masks)[UP_PATH], without_column.T)
    _, masks = barber_jax.load(tiny())
    assert all(np.ndim(mask) == 0 and mask for mask in flat(masks).values())


def test_given_masks_prune_a_dense_model(pruned, tiny, tmp_path):
    module, masks = barber_jax.load(tiny(), masks=pruned / MASKS)
    mask = flat(masks)[UP_PATH]
    np.testing.assert_array_equal(mask, read_masks(pruned).read(UP).T)
    kernel = np.asarray(parameters(module)[UP_PATH])
    dense = open_checkpoint(str(tiny())).read(UP).T
    np.testing.assert_array_equal(kernel, np.where(mask, dense, 0))
    barber_jax.save(module, masks, tmp_path / "out")
    np.testing.assert_array_equal(read_masks(tmp_path / "out").read(UP), mask.T)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("unstructured", 0.3)])
def test_a_new_mask_file_says_which_pattern_its_masks_have(tmp_path, tiny, pattern, sparsity):
    source = write_pruned(tmp_path / "pruned", tiny(), pattern, sparsity)
    module, masks = barber_jax.load(tiny(), masks=source)
    barber_jax.save(module, masks, tmp_path / "out")
    given, wanted = read_masks(tmp_path / "out"), read_masks(source)
    assert given.pattern == pattern
    assert given.sparsity == pytest.approx(sparsity, abs=0.01)
    for name in wanted.names():
        np.testing.assert_array_equal(given.read(name), wanted.read(name))


def test_dtypes(tmp_path):
    """A bfloat16 checkpoint in shards is trained in float32, and written as it was."""
    write_model(tmp_path / "dense", dtype="bfloat16", shard_size=20_000)
    source = write_pruned(tmp_path / "pruned", tmp_path / "dense")
    module, masks = barber_jax.load(source, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in parameters(module).values()} == {jnp.dtype("float32")}
    assert module.layers[0].mlp.up_proj(jnp.ones((1, 32))).dtype == jnp.bfloat16
    assert run(module).dtype == np.float32
    barber_jax.save(module, masks, tmp_path / "out")
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    half, _ = barber_jax.load(source, dtype="bfloat16")
    assert {leaf.dtype for leaf in parameters(half).values()} == {jnp.dtype("bfloat16")}


def one_step(module, masks, rate=0.01):
    """Train with AdamW on next-token cross-entropy for one step."""
    optimizer = nnx.Optimizer(module, barber_jax.keep_pruned(optax.adamw(rate), masks), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(IDS[0][:, :-1]), IDS[0][:, 1:]).mean()

        optimizer.update(module, nnx.grad(loss)(module))

    step(module, optimizer)


def test_a_tied_head_stays_the_embedding_in_training_and_in_the_folder(tmp_path):
    """Also where the checkpoint stores a copy of the embedding as its head."""
    write_model(tmp_path / "dense", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    module, masks = barber_jax.load(tmp_path / "dense")
    assert "head.lm_head.kernel" not in parameters(module)
    before = np.asarray(module.embed.embed_tokens.embedding[...])
    one_step(module, masks)
    after = np.asarray(module.embed.embed_tokens.embedding[...])
    # Every row gets a gradient, as the output of the head; as input only tokens in the text would.
    assert (before != after).any(axis=1).all()
    barber_jax.save(module, masks, tmp_path / "out")
    assert not (tmp_path / "out" / MASKS).exists()
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], after)
    np.testing.assert_array_equal(written["lm_head.weight"], after)
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), run(module), atol=1e-4, rtol=0)


def test_training_keeps_the_masks_and_the_folder_keeps_the_file(pruned, tmp_path):
    module, masks = barber_jax.load(pruned)
    before = run(module)
    one_step(module, masks)
    assert np.abs(run(module) - before).max() > 0.01
    source = shutil.copytree(pruned, tmp_path / "source")
    (source / "README.md").write_text("The perplexity of these weights is 9.")
    (source / "run.json").write_text("{}")
    barber_jax.save(module, masks, tmp_path / "out", like=source)
    assert (tmp_path / "out" / MASKS).read_bytes() == (pruned / MASKS).read_bytes()
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), run(module), atol=1e-4, rtol=0)
    assert not (tmp_path / "out" / "README.md").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text()).keys() == {"saved"}
    # So it is of a recovered one, whose recover.json tells of other weights too.
    (source / "run.json").rename(source / "recover.json")
    barber_jax.save(module, masks, tmp_path / "again", like=source)
    assert not any((tmp_path / "again" / name).exists() for name in ("README.md", "recover.json"))
    # An earlier result may be replaced, if asked.
    with pytest.raises(BarberError, match="exists"):
        barber_jax.save(module, masks, tmp_path / "out")
    barber_jax.save(module, masks, tmp_path / "out", overwrite=True)


def test_masks_of_another_checkpoint_are_refused(pruned, tiny, tmp_path):
    copy = shutil.copytree(tiny(), tmp_path / "copy")
    shutil.copyfile(pruned / MASKS, copy / MASKS)
    with pytest.raises(BarberError, match=r"q_proj.weight is not zero everywhere that its masks.safetensors prunes"):
        barber_jax.load(copy)
    with pytest.raises(BarberError, match=r"mask model\.decoder\.layers.* is unexpected|is missing"):
        barber_jax.load(tiny("opt"), masks=pruned)


def refused(module, masks, out, said, **options):
    with pytest.raises(BarberError, match=said):
        barber_jax.save(module, masks, out, **options)
    assert not out.exists() and not list(out.parent.glob("*.partial"))


def test_what_save_refuses(pruned, tiny, tmp_path):
    module, masks = barber_jax.load(pruned)
    out = tmp_path / "out"
    dense, _ = barber_jax.load(tiny())
    refused(dense, masks, out, "q_proj.weight is not zero everywhere that its mask prunes; train with keep_pruned")
    refused(module, masks, out, "only .*opt.* has a parameter embed.embed_positions.*like=", like=tiny("opt"))
    refused(module, masks, out, r"has shape .* like=", like=tiny(intermediate_size=64))
    refused(module, {**masks, "head": np.True_, "unknown": np.True_}, out, "mask unknown has no parameter")
    vector = {**masks, "head": {**masks["head"], "norm": np.zeros(32, bool)}}
    refused(module, vector, out, "mask head.norm.scale: only the linears of the decoder blocks")
    # The weights would fit, but not the configuration.
    refused(module, masks, out, "its rope theta .*like=", like=tiny(rope_theta=5e5))
    module.source = ""
    refused(module, masks, out, "like=")
    kernel = module.layers[0].mlp.up_proj.kernel
    floats = kernel[...]
    kernel.set_value(floats.astype(jnp.int8))
    refused(module, masks, out, "up_proj.kernel of the module is int8, not floating-point", like=pruned)
    kernel.set_value(floats)
    kernel[...] = jnp.where(masks["layers"][0]["mlp"]["up_proj"]["kernel"], jnp.inf, 0)
    refused(module, masks, out, "up_proj.weight gets values that do not fit", like=pruned)


def test_values_that_do_not_fit_the_dtype(tmp_path):
    write_model(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors[UP][0, 0] = 1e6
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BarberError, match=r"up_proj.weight does not fit float16; load it with dtype='float32'"):
        barber_jax.load(tmp_path / "dense", dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float64", "float8_e4m3fn", "nonsense", object])
def test_dtypes_that_lose_values_are_refused(tiny, dtype):
    for argument in ("dtype", "compute_dtype"):
        with pytest.raises(BarberError, match=rf"^{argument} .* is not one of float32, float16, bfloat16"):
            barber_jax.load(tiny(), **{argument: dtype})


def test_structure_without_allocation(tiny):
    """Masks map onto the parameters, as a plain dict and as the state of an optimizer."""
    module, masks = barber_jax.load(tiny())
    jax.tree.map(lambda parameter, mask: None, nnx.to_pure_dict(nnx.state(module, nnx.Param)), masks)
