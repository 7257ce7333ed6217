"""Masks in PyTorch: applied, kept while training, checked; the command line; the guards before sparse kernels."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
# ruff: noqa: E402 - what follows imports torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from barber_jax.console.errors import BarberError
from barber_jax.convert import torch_masks
from barber_jax.convert.apply_masks import ApplyConfig, apply
from barber_jax.convert.torch_masks import apply_masks, check_masks, load_masks, make_permanent
from barber_jax.convert.torch_model import load_model
from barber_jax.masks.mask_file import mask_metadata, pack, read_masks

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
UP = "model.layers.0.mlp.up_proj.weight"
FORMS = pytest.mark.parametrize("form", ["dict", "file", "path"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def random_masks(seed=1):
    """2:4 masks for every linear weight of the blocks."""
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape)
            for name, value in LlamaForCausalLM(CONFIG).named_parameters()
            if "proj" in name and value.ndim == 2
        }
    rng = np.random.default_rng(seed)
    scores = {name: rng.random((out * n // 4, 4)) for name, (out, n) in shapes.items()}
    return {name: (s.argsort(1).argsort(1) < 2).reshape(shapes[name]) for name, s in scores.items()}


def write(path, masks, pattern="2:4"):
    shapes = {name: mask.shape for name, mask in masks.items()}
    save_file({name: pack(mask) for name, mask in masks.items()}, path, mask_metadata(pattern, 0.5, shapes))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "masks.safetensors"
    write(path, random_masks())
    return path


def in_form(path, form):
    return {"dict": load_masks, "file": read_masks, "path": str}[form](path)


def weights(model, masks):
    return {name: model.get_submodule(name.removesuffix(".weight")).weight.detach().clone() for name in masks}


def test_importing_does_not_load_jax():
    code = (
        "import sys, barber_jax.convert.torch_masks, barber_jax.convert.apply_masks\n"
        "print([m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_load_masks(path):
    masks = load_masks(path)
    assert masks[UP].dtype == torch.bool
    for name, mask in random_masks().items():
        assert np.array_equal(masks[name].numpy(), mask)


@FORMS
@pytest.mark.parametrize("method", ["prune", "in_place"])
def test_pruned_weights_become_zero_and_kept_ones_stay(model, path, form, method):
    masks = load_masks(path)
    dense = weights(model, masks)
    lm_head = model.lm_head.weight.clone()
    assert not check_masks(model, in_form(path, form)).ok
    apply_masks(model, in_form(path, form), method)
    assert check_masks(model, in_form(path, form)).ok
    for name, weight in weights(model, masks).items():
        assert torch.equal(weight, torch.where(masks[name], dense[name], 0))
    assert torch.equal(model.lm_head.weight, lm_head)


def test_both_methods_give_the_same_logits(model, path):
    tokens = torch.arange(10)[None]
    other = LlamaForCausalLM(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    apply_masks(model, path)
    apply_masks(other, path, "in_place")
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_training_keeps_the_zeros_and_moves_the_rest(model, path):
    masks = load_masks(path)
    apply_masks(model, masks)
    before = weights(model, masks)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.arange(20)[None]
    for _ in range(2):
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
        assert check_masks(model, masks).ok
    make_permanent(model)
    assert check_masks(model, masks).ok
    assert not torch.equal(weights(model, masks)[UP], before[UP])
    assert not any("weight_orig" in name for name in model.state_dict())
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, torch.nn.Parameter)


def test_check_sees_an_optimisers_step_before_the_next_forward_pass(model, path):
    masks = load_masks(path)
    apply_masks(model, masks)
    linear = model.model.layers[0].mlp.up_proj
    kept = masks[UP].nonzero()[0].tolist()
    linear.weight_orig.data[tuple(kept)] = 0
    assert {m.name: m.natural_zeros for m in check_masks(model, masks).matrices}[UP] == 1


@pytest.mark.parametrize("method", ["prune", "in_place"])
def test_a_new_mask_replaces_the_old_one(model, path, method):
    dense = weights(model, [UP])[UP]
    apply_masks(model, path)
    new = {UP: torch.from_numpy(random_masks(seed=2)[UP])}
    apply_masks(model, new, method)
    assert torch.equal(weights(model, [UP])[UP], torch.where(new[UP], dense, 0))
    model(torch.arange(10)[None])
    assert check_masks(model, new).ok
    assert hasattr(model.model.layers[0].mlp.up_proj, "weight_orig") == (method == "prune")
    make_permanent(model)
    assert torch.equal(weights(model, [UP])[UP], torch.where(new[UP], dense, 0))


def test_in_place_zeroes_even_what_is_not_a_number(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    mask = torch.ones(48, 32, dtype=torch.bool)
    mask[0, 0] = False
    assert check_masks(model, {UP: mask}).total.violations == 1
    apply_masks(model, {UP: mask}, "in_place")
    assert check_masks(model, {UP: mask}).ok


def test_report_counts(model):
    mask = torch.zeros(48, 32, dtype=torch.bool)
    mask[:, :8] = True
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight.fill_(1)
        weight[:, 8:] = 0
        weight[0, 0] = -0.0  # natural zero
        weight[3, 9] = weight[4, 9] = 1  # violations
    report = check_masks(model, {UP: mask, UP.replace("0", "1"): torch.ones(48, 32, dtype=torch.bool)})
    first, total = report.matrices[0], report.total
    assert (first.size, first.kept, first.violations, first.natural_zeros) == (48 * 32, 48 * 8, 2, 1)
    assert first.zeros == 48 * 24 - 2 + 1
    assert first.sparsity == 0.75
    assert (total.size, total.violations, total.sparsity) == (2 * 48 * 32, 2, 0.375)
    assert not report.ok
    lines = report.table().splitlines()
    assert len(lines) == 4
    assert UP in lines[1] and "0.7500" in lines[1] and lines[3].startswith("total")


def test_a_base_model_may_lack_the_prefix_or_the_masks_may(path):
    base = LlamaModel(CONFIG)
    apply_masks(base, path)
    assert check_masks(base, path).ok
    whole = LlamaForCausalLM(CONFIG)
    bare = {name.removeprefix("model."): mask for name, mask in load_masks(path).items()}
    apply_masks(whole, bare)
    assert check_masks(whole, path).ok


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.7.mlp.up_proj.weight", (48, 32), "has no weight model.layers.7.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj", (48, 32), "has no weight model.layers.0.mlp.up_proj;"),
        (UP, (32, 48), r"\(48, 32\) in the model, \(32, 48\) in the masks"),
        ("model.embed_tokens.weight", (64, 32), "belongs to a Embedding; only the weights of nn.Linear"),
    ],
)
def test_masks_of_another_model_change_nothing(model, name, shape, words):
    good = {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.bool)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for method in ("prune", "in_place"):
        with pytest.raises(BarberError, match=words):
            apply_masks(model, {**good, name: torch.zeros(shape, dtype=torch.bool)}, method)
    with pytest.raises(BarberError, match=words):
        check_masks(model, {name: torch.zeros(shape, dtype=torch.bool)})
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unknown_methods_are_refused(model, path):
    with pytest.raises(ValueError, match="half"):
        apply_masks(model, path, "half")


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_applies_checks_and_saves(folder, path, tmp_path, capsys):
    out = tmp_path / "out"
    apply(ApplyConfig(model=str(folder), masks=path, out=out))
    printed = capsys.readouterr().out
    assert "pruned weights were not zero and have been set to zero\n" in printed
    assert "has no tokenizer" in printed
    assert f"{UP}  " in printed and "0.5000" in printed
    assert check_masks(AutoModelForCausalLM.from_pretrained(out), path).ok
    apply(ApplyConfig(model=str(out), masks=path, check_only=True))
    assert "were not zero" not in capsys.readouterr().out


def test_command_refuses_to_save_what_does_not_fit_the_configs_dtype(folder, path, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    tensors[name][0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BarberError, match=f"tensor {name} holds NaN or Inf as float16, the dtype in its config"):
        apply(ApplyConfig(model=str(folder), masks=path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_saves_a_tokenizer_that_every_version_of_transformers_loads(folder, path, tmp_path):
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    apply(ApplyConfig(model=str(folder), masks=path, out=tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b")["input_ids"] == [1]


def test_command_check_only_exits_1_and_prints_the_table(folder, path, capsys):
    with pytest.raises(SystemExit) as exit_:
        apply(ApplyConfig(model=str(folder), masks=path, check_only=True))
    assert exit_.value.code == 1
    assert "violations" in capsys.readouterr().out


def test_command_refuses_mistakes(folder, path, tmp_path):
    with pytest.raises(BarberError, match="--check-only saves nothing"):
        apply(ApplyConfig(model=str(folder), masks=path, out=tmp_path / "o", check_only=True))
    with pytest.raises(BarberError, match="exists and is not an empty folder"):
        apply(ApplyConfig(model=str(folder), masks=path, out=folder))
    with pytest.raises(BarberError, match="no such file"):
        apply(ApplyConfig(model=str(folder), masks=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BarberError, match=r"--model .*empty: cannot load it"):
        apply(ApplyConfig(model=str(tmp_path / "empty"), masks=path))


def test_command_without_out_says_that_nothing_is_written(folder, path, capsys):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    apply(ApplyConfig(model=str(folder), masks=path))
    assert "have been set to zero (in memory only: --out DIR saves the model)" in capsys.readouterr().out
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) == before


ENTRIES = pytest.mark.parametrize("entry", [["barber_jax.convert.apply_masks"], ["barber_jax", "torch-masks"]])


@ENTRIES
def test_command_line_applies(entry, folder, path, tmp_path):
    line = [sys.executable, "-m", *entry, "--model", folder, "--masks", path, "--out", tmp_path / "out"]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert check_masks(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), path).ok


@ENTRIES
def test_command_line_prints_one_error_line(entry, tmp_path):
    arguments = ["--model", str(tmp_path), "--masks", str(tmp_path / "none.safetensors")]
    done = subprocess.run([sys.executable, "-m", *entry, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.safetensors'}: no such file; give a masks.safetensors file\n"


def test_command_line_without_torch_says_what_to_install(path, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')")
    line = [sys.executable, "-m", "barber_jax", "torch-masks"]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run([*line, "--model", str(tmp_path), "--masks", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: torch is not installed; pip install 'barber_jax[torch]' installs it\n"
    done = subprocess.run([*line, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--check-only" in done.stdout


def test_semi_structured_needs_a_gpu(model, path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BarberError, match="need a CUDA device"):
        torch_masks.to_semi_structured(model, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(BarberError, match=r"compute capability 8\.0"):
        torch_masks.to_semi_structured(model, path)


@pytest.fixture
def ampere(monkeypatch):
    """Only says that there is such a GPU: what the guards see, not what the kernels need."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.mark.usefixtures("ampere")
def test_semi_structured_guards(model, path, tmp_path):
    write(tmp_path / "unstructured", random_masks(), "unstructured")
    with pytest.raises(BarberError, match="its pattern is unstructured, not 2:4"):
        torch_masks.to_semi_structured(model, tmp_path / "unstructured")
    with pytest.raises(BarberError, match=f"{UP}: its mask is not 2:4"):
        torch_masks.to_semi_structured(model, {UP: torch.ones(48, 32, dtype=torch.bool)})
    with pytest.raises(BarberError, match=r"is torch\.float32; load the model with"):
        torch_masks.to_semi_structured(model, path)
    model.half()
    with pytest.raises(BarberError, match="call apply_masks first"):
        torch_masks.to_semi_structured(model, path)
    apply_masks(model, path)
    with pytest.raises(BarberError, match=r"is on cpu; move the model"):
        torch_masks.to_semi_structured(model, path)


@pytest.mark.usefixtures("ampere")
def test_semi_structured_names_the_weight_that_the_kernels_refuse(model, path, monkeypatch):
    monkeypatch.setattr(torch_masks, "_check_semi_structured", lambda *_: None)
    apply_masks(model.half(), path)
    with pytest.raises(BarberError, match=r"model\.layers\.0\..*: the sparse kernels refuse it"):
        torch_masks.to_semi_structured(model, path)


def test_code_of_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BarberError, match="which is never run; load the model in a program of your own"):
        load_model(str(tmp_path), "--model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_config_json_names_is_not_fetched(folder, entry):
    """Native code of anybody's: without `attention`, transformers asks the package `kernels` for it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {entry: "somebody/kernel"}))
    for attention in ("eager", "sdpa"):
        assert load_model(str(folder), "--model", attention).config._attn_implementation == attention


def test_what_transformers_cannot_load_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    with pytest.raises(BarberError, match=f"--ckpt {tmp_path}: cannot load it: "):
        load_model(str(tmp_path), "--ckpt")
