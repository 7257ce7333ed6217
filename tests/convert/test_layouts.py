"""Checkpoints as people have them: other names, masks left in, split GGUF files, and what is named instead of read."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf
from checkpoints import IDS, our_logits, torch
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.__main__ import ConvertConfig, convert
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.gguf_file import GGUFCheckpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.convert.tensor_names import stored_names
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model, plain_config

UP = "model.layers.0.mlp.up_proj.weight"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9085657\n"


def rewritten(source, folder, rename, **changes):
    """The model of a folder under other names, and with other entries in config.json."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def tensors_of(spec):
    checkpoint = open_checkpoint(str(spec))
    check_tensors(checkpoint, build_model(checkpoint.config, jnp.dtype("float32")))
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_same(given, wanted):
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(given[name], value, err_msg=name)


def refused(spec, match):
    with pytest.raises(BarberError, match=match) as caught:
        checkpoint = open_checkpoint(str(spec))
        check_tensors(checkpoint, build_model(checkpoint.config, jnp.dtype("float32")))
    assert "\n" not in str(caught.value)


# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod._checkpoint_wrapped_module."),
        lambda name: f"module.{name.removeprefix('model.')}",
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prefixes_of_wrappers_are_removed(tmp_path, tiny, family, rename):
    source = tiny(family)
    assert_same(tensors_of(rewritten(source, tmp_path / "wrapped", rename)), tensors_of(source))


@pytest.mark.parametrize(
    ("family", "prefix", "architecture"),
    [
        ("llama", "model.", "LlamaModel"),
        ("llama", "", "LLaMAForCausalLM"),
        ("opt", "model.", "OPTModel"),
        ("opt", "model.decoder.", "OPTModel"),
        ("qwen3", "model.", "Qwen3Model"),
    ],
)
def test_base_models_and_old_spellings(tmp_path, tiny, family, prefix, architecture):
    source = tiny(family, tie_word_embeddings=True)
    named = {"architectures": [architecture]}
    folder = rewritten(source, tmp_path / "base", lambda name: name.removeprefix(prefix), **named)
    assert_same(tensors_of(folder), tensors_of(source))
    # The result holds the whole model under its usual names, and says so.
    convert(ConvertConfig(ckpt=str(folder), out=tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(source / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (".parametrizations.weight.original", r"up_proj\.weight is missing; it is parametrized .*squash_mask"),
        (".weight_v", r"up_proj\.weight is missing; it is split by .*remove_weight_norm"),
        (None, r"embed_tokens\.weight is missing; its tensors have names with something in front"),
    ],
    ids=["parametrized", "weight_norm", "prefix"],
)
def test_the_way_out_of_names_that_are_not_read(tmp_path, tiny, stored, says):
    source = shutil.copytree(tiny(), tmp_path / "source")
    weights = source / "model.safetensors"
    rename = lambda name: name.replace("up_proj.weight", f"up_proj{stored}") if stored else f"language_model.{name}"  # noqa: E731
    save_file({rename(name): tensor for name, tensor in load_file(weights).items()}, weights)
    checkpoint = open_checkpoint(str(source))
    with pytest.raises(BarberError, match=says):
        check_tensors(checkpoint, build_model(checkpoint.config, np.dtype("float32")))


def test_names_that_cannot_be_told_are_refused(tmp_path, tiny):
    with pytest.raises(BarberError, match=r"lora_A\.weight belongs to a PEFT adapter .* merge_and_unload"):
        stored_names(["base_model.model.model.a.lora_A.weight", "base_model.model.model.a.base_layer.weight"], "x", "m")
    with pytest.raises(BarberError, match=r"model\.a\.weight and .*_orig_mod\.a\.weight are both tensor"):
        stored_names(["model.a.weight", "model._orig_mod.a.weight"], "llama", "m")
    with pytest.raises(BarberError, match=r"model\.a\.weight and model\.a\.weight_orig are both tensor"):
        stored_names(["model.a.weight", "model.a.weight_orig", "model.a.weight_mask"], "llama", "m")
    for half, other in (("orig", "mask"), ("mask", "orig")):
        with pytest.raises(BarberError, match=rf"model\.a\.weight_{other} is missing .*prune\.remove"):
            stored_names([f"model.a.weight_{half}"], "llama", "m")
    # Only some names begin so: they are a model's own.
    refused(rewritten(tiny(), tmp_path / "some", lambda n: f"module.{n}" if n == UP else n), f"{UP} is missing")


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_buffers_may_have_any_dtype(tmp_path, tiny, dtype):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, dtype) for i in range(2)}
    save_file(tensors | buffers, folder / "model.safetensors")
    assert_same(tensors_of(folder), tensors)
    convert(ConvertConfig(ckpt=str(folder), out=tmp_path / "out"))
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()


# Masks of torch.nn.utils.prune


def prune_left_in(source, folder, name=UP, dtype=np.float32):
    """The model with one weight as torch.nn.utils.prune leaves it; returns its mask, bool."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    weight = tensors.pop(name)
    # A kept weight that is zero, and a pruned one that is not finite.
    weight[0, :2] = 0, np.inf
    mask = np.random.default_rng(0).random(weight.shape) < 0.5
    mask[0, :2] = True, False
    tensors |= {f"{name}_orig": weight, f"{name}_mask": mask.astype(dtype)}
    save_file(tensors, folder / "model.safetensors")
    return mask


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_weights_left_by_torch_prune_are_read_with_their_mask(tmp_path, tiny, dtype):
    wanted = load_file(tiny() / "model.safetensors")
    mask = prune_left_in(tiny(), tmp_path / "pruned", dtype=dtype)
    wanted[UP][0, :2] = 0
    wanted[UP] = np.where(mask, wanted[UP], 0)
    given = tensors_of(tmp_path / "pruned")
    assert_same(given, wanted)
    assert not np.signbit(given[UP][~mask]).any()
    checkpoint = open_checkpoint(str(tmp_path / "pruned"))
    np.testing.assert_array_equal(checkpoint.mask(UP), mask)
    assert checkpoint.mask(UP.replace("up", "gate")) is None


def test_mask_of_another_shape(tmp_path, tiny):
    prune_left_in(tiny(), tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned/model.safetensors")
    tensors[f"{UP}_mask"] = tensors[f"{UP}_mask"][1:]
    save_file(tensors, tmp_path / "pruned/model.safetensors")
    with pytest.raises(BarberError, match=r"up_proj\.weight_mask has shape \[47, 32\], its weight \[48, 32\]"):
        open_checkpoint(str(tmp_path / "pruned")).read(UP)


def test_our_own_masks_saved_from_pytorch_come_back(tmp_path, tiny):
    torch.nn  # noqa: B018 - skipped without PyTorch
    from transformers import AutoModelForCausalLM

    from barber_jax.convert.apply_masks import ApplyConfig, apply
    from barber_jax.convert.torch_masks import apply_masks

    model = AutoModelForCausalLM.from_pretrained(tiny())
    mask = np.random.default_rng(0).random((48, 32)) < 0.5
    apply_masks(model, {UP: torch.from_numpy(mask)}, "prune")
    model.save_pretrained(tmp_path / "pruned")
    wanted = load_file(tiny() / "model.safetensors")
    wanted[UP] = np.where(mask, wanted[UP], 0)
    assert_same(tensors_of(tmp_path / "pruned"), wanted)
    # transformers would fill the weight with random numbers.
    shutil.copyfile(tiny() / "config.json", tmp_path / "pruned/config.json")
    convert(ConvertConfig(ckpt=str(tmp_path / "pruned"), out=tmp_path / "plain"))
    masks = tmp_path / "masks.safetensors"
    from barber_jax.masks.mask_file import mask_metadata, pack

    save_file({UP: pack(mask)}, masks, mask_metadata("unstructured", 0.5, {UP: mask.shape}))
    with pytest.raises(BarberError, match=r"up_proj\.weight is not in it .*barber_jax\.convert"):
        apply(ApplyConfig(model=str(tmp_path / "pruned"), masks=masks))
    apply(ApplyConfig(model=str(tmp_path / "plain"), masks=masks, check_only=True))


# config.json


COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
SPARSE = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"}


@pytest.mark.parametrize("settings", [COMPRESSED, COMPRESSED | {"sparsity_config": SPARSE}])
def test_compressed_tensors_that_are_only_sparse(tmp_path, tiny, settings):
    folder = rewritten(tiny(), tmp_path / "sparse", str, quantization_config=settings)
    assert_same(tensors_of(folder), tensors_of(tiny()))
    config = json.loads((folder / "config.json").read_text())
    # Not of the result: its sparsity is another.
    assert plain_config(config) == json.loads((tiny() / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            COMPRESSED | {"sparsity_config": SPARSE | {"format": "sparse-24-bitmask"}},
            "sparse checkpoint, not quantised, but stored as 'sparse-24-bitmask'; save it again with save_compressed",
        ),
        (COMPRESSED | {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, "quantised checkpoint"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}, "sparsity_config": SPARSE}, "quantised checkpoint"),
        (COMPRESSED | {"format": "pack-quantized"}, "quantised checkpoint"),
        ({"quant_method": "gptq", "bits": 4}, "quantised checkpoint"),
        ([1], "quantised checkpoint"),
    ],
)
def test_what_is_stored_otherwise_is_refused(tmp_path, tiny, settings, match):
    refused(rewritten(tiny(), tmp_path / "model", str, quantization_config=settings), match)


# What is no checkpoint


def test_adapter_is_named(tmp_path, tiny):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": np.zeros(3, np.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    refused(adapter, "a PEFT adapter, not a model; merge it into its base model x/y with PEFT's merge_and_unload")
    (adapter / "adapter_config.json").write_text("[]")
    shutil.copyfile(tiny() / "config.json", adapter / "config.json")
    refused(adapter, "a PEFT adapter, not a model; merge it into its base model with")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_beside_a_model_is_not_left_out_in_silence(tmp_path, tiny, suffix):
    """transformers applies it where PEFT is installed."""
    folder = shutil.copytree(tiny(), tmp_path / "both")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    # A leftover.
    assert_same(tensors_of(folder), tensors_of(tiny()))
    (folder / f"adapter_model.{suffix}").touch()
    refused(folder, r"holds a model and a PEFT adapter beside it; merge them .* a folder without adapter_config\.json")


def test_an_adapter_on_the_hub_stands_for_its_own_base_model(tmp_path, tiny, monkeypatch):
    folder = shutil.copytree(tiny(), tmp_path / "both")
    monkeypatch.setattr("barber_jax.convert.download.download", lambda spec: folder)
    assert_same(tensors_of("a/b"), tensors_of(tiny()))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BarberError, match=r"^a/b: holds a model and a PEFT adapter"):
        open_checkpoint("a/b")


def test_an_untied_base_model_has_no_head(tmp_path, tiny):
    folder = rewritten(tiny(), tmp_path / "base", lambda name: name, architectures=["LlamaModel"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    refused(
        folder,
        r"lm_head\.weight is missing; .* the base model \(LlamaModel\), which has no head: save it from LlamaFor",
    )


@pytest.mark.parametrize("everything", [False, True])
def test_weights_that_zero_3_left_elsewhere(tmp_path, tiny, everything):
    folder = shutil.copytree(tiny(), tmp_path / "empty")
    tensors = load_file(folder / "model.safetensors")
    # Small tensors are kept whole by default.
    empty = {name: np.zeros(0, np.float32) for name in tensors if everything or "norm" not in name}
    save_file(tensors | empty, folder / "model.safetensors")
    refused(
        folder, r"is empty \(shape \[0\]\), as DeepSpeed's ZeRO-3 .* zero_to_fp32\.py .* stage3_gather_16bit_weights_on"
    )


def test_folder_of_gguf(tmp_path):
    path = test_gguf.write(tmp_path / "a.gguf", test_gguf.gguf_tensors(test_gguf.hf_tensors()))
    refused(tmp_path, re.escape(f"holds a GGUF file; give {path} itself"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pointers_instead_of_files(tmp_path, tiny, file):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    (folder / file).write_text(LFS_POINTER)
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    refused(folder, re.escape(f"{folder / file}: a Git LFS pointer") + ".*git lfs pull")


def test_pointers_of_other_kinds(tmp_path, tiny):
    for file in ("a.gguf", "masks.safetensors"):
        (tmp_path / file).write_text(LFS_POINTER)
    refused(tmp_path / "a.gguf", "a Git LFS pointer")
    with pytest.raises(BarberError, match="a Git LFS pointer"):
        read_masks(tmp_path)
    torch.nn  # noqa: B018 - skipped without PyTorch
    (tmp_path / "pytorch_model.bin").write_text(LFS_POINTER)
    shutil.copyfile(tiny() / "config.json", tmp_path / "config.json")
    refused(tmp_path, r"pytorch_model\.bin: a Git LFS pointer")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_tokenizer_that_is_a_pointer(tmp_path, tiny, file):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    (folder / "vocab.json").write_text("{}")
    (folder / file).write_text(LFS_POINTER)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(BarberError, match=rf"{file}: a Git LFS pointer"):
        checkpoint.tokenizer()
    # Nor is it copied into a result.
    with pytest.raises(BarberError, match=rf"{file}: a Git LFS pointer"):
        convert(ConvertConfig(ckpt=str(folder), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Split GGUF files


def split(folder, parts=3):
    """A GGUF file, split as llama-gguf-split does, and the same in one file."""
    stored = test_gguf.gguf_tensors(test_gguf.hf_tensors(tied=False))
    names, paths = list(stored), []
    for part in range(parts):
        paths.append(folder / f"m-{part + 1:05d}-of-{parts:05d}.gguf")
        fields = {"split.no": part, "split.count": parts, "split.tensors.count": len(stored)}
        fields |= dict.fromkeys(test_gguf.FIELDS) if part else {}
        test_gguf.write(paths[-1], {name: stored[name] for name in names[part::parts]}, fields)
    return paths, test_gguf.write(folder / "whole.gguf", stored)


def test_all_parts_of_a_split_gguf_are_read(tmp_path):
    parts, whole = split(tmp_path)
    for part in parts:
        checkpoint = GGUFCheckpoint(part)
        assert checkpoint.config == GGUFCheckpoint(whole).config
        assert checkpoint.sources() == parts
        assert_same(tensors_of(part), tensors_of(whole))


def test_parts_that_do_not_fit(tmp_path):
    parts, _ = split(tmp_path)
    held = parts[1].read_bytes()
    parts[1].unlink()
    refused(parts[0], re.escape(f"{parts[1]}: part 2 of 3 of a split GGUF file is not there"))
    parts[1].write_bytes(parts[2].read_bytes())
    refused(parts[0], re.escape(f"{parts[1]}: not part 2 of 3"))
    parts[1].write_bytes(held.replace(b"blk.0.attn_q.weight", b"blk.0.attn_X.weight"))
    alone = parts[0].rename(tmp_path / "alone.gguf")
    refused(alone, "one of 3 parts .* NAME-00001-of-00003.gguf; rename the parts, or merge them with llama-gguf-split")


# A GGUF file whose tokenizer cannot be built


def gguf_with_tokenizer(path, pre):
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    fields |= {"tokenizer.ggml.tokens": ["a", "b", "ab", *map(str, range(37))], "tokenizer.ggml.merges": ["a b"]}
    fields |= {"tokenizer.ggml.token_type": [1] * 40}
    return test_gguf.write(path, test_gguf.gguf_tensors(test_gguf.hf_tensors()), fields)


def test_unknown_pre_tokenizer_is_no_obstacle_without_text(tmp_path, capsys):
    path = gguf_with_tokenizer(tmp_path / "a.gguf", "unheard-of")
    with pytest.raises(BarberError, match=r"pre-tokenizer 'unheard-of' .*; give token ids \(\.npy\) instead"):
        open_checkpoint(str(path)).tokenizer()
    convert(ConvertConfig(ckpt=str(path), out=tmp_path / "out"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no tokenizer is written") and str(path) in line and "'unheard-of'" in line
    files = {file.name for file in (tmp_path / "out").iterdir()}
    weights = {"model.safetensors", "model.safetensors.index.json"}
    assert files == {"config.json", "generation_config.json", "run.json", *weights}
    ids = IDS % 40
    np.testing.assert_array_equal(our_logits(tmp_path / "out", ids=ids), our_logits(path, ids=ids))
