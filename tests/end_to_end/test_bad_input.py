"""Bad input: each kind is one line `error: ...` that names the culprit, exit status 2, and nothing left behind.

Most cases call the command lines' own entry in this process; the last ones go through a process of their own.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import test_gguf
from checkpoints import LLAMA3, write_model
from cli import command
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from barber_jax import prune
from barber_jax.__main__ import COMMANDS, dispatch
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.convert.export import FolderWriter
from barber_jax.convert.hf_folder import INDEX, WEIGHTS, HFFolder
from barber_jax.eval import demo, perplexity

UP = "model.layers.1.mlp.up_proj.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
# The way through the program that compiles least.
QUICK = ["--method", "magnitude", "--no-rebuild"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny model with a tokenizer: `w17` is id 17."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    write_model(folder)
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(96)} | {"[UNK]": 96}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def ids(tmp_path):
    """8 rows of 16 token ids."""
    return save(tmp_path, np.random.default_rng(0).integers(0, 97, (8, 16)))


def save(folder, array):
    path = folder / "ids.npy"
    np.save(path, array)
    return path


class Refusal:
    """Runs a command line that must refuse, in a folder that must stay as it is."""

    def __init__(self, folder, capsys):
        self._folder, self._capsys = folder, capsys

    def prune(self, ckpt, ids, *options, says, out=None, after_headline=False):
        """`says`: what the line must hold. `after_headline`: found mid-run, when one line has been printed already."""
        given = ["--ckpt", ckpt, "--calibration", ids, "--samples", 2, "--length", 8]
        arguments = [*given, "--out", out or self._folder / "out", *options]
        return self._run(prune.run, arguments, says, int(after_headline))

    def perplexity(self, ckpt, *options, says, midway=False):
        return self._run(perplexity.run, ["--ckpt", ckpt, *options], says, int(midway))

    def _run(self, main, arguments, says, lines_before):
        before = snapshot(self._folder)
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda: main([str(argument) for argument in arguments]))
        assert stop.value.code == 2
        printed = self._capsys.readouterr()
        *earlier, line = printed.err.splitlines()
        assert len(earlier) == lines_before, printed.err
        assert line.startswith("error: ")
        for part in [says] if isinstance(says, str) else says:
            assert part in line
        assert not printed.out
        # No output, no .partial, and whatever stood there is untouched.
        assert snapshot(self._folder) == before
        return line


@pytest.fixture
def refused(tmp_path, capsys):
    return Refusal(tmp_path, capsys)


def snapshot(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model, edit):
    tensors = safetensors.numpy.load_file(model / WEIGHTS)
    edit(tensors)
    safetensors.numpy.save_file(tensors, model / WEIGHTS, {"format": "pt"})


def shard(model, **places):
    """Split the weights into two files with an index; `places` overrides entries of the index."""
    tensors = safetensors.numpy.load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    table = {name: SHARDS[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in SHARDS:
        held = {name: tensor for name, tensor in tensors.items() if table[name] == file}
        safetensors.numpy.save_file(held, model / file, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": table | places}))
    return table


# The checkpoint


@pytest.mark.parametrize("name", ["gone", "gone/deeper", "gone.gguf"])
def test_missing_path(refused, tmp_path, ids, name):
    says = [str(tmp_path / name), "check the path", "No such file" if name.endswith("gguf") else "no such file"]
    refused.prune(tmp_path / name, ids, says=says)


def test_path_that_is_no_checkpoint(refused, tmp_path, ids):
    refused.prune(ids, ids, says=[str(ids), "neither a checkpoint folder nor a .gguf file"])
    refused.prune("", ids, says="--ckpt is empty")
    refused.prune("/" + "a" * 300, ids, says=["aaa: File name too long", "give another path"])
    (tmp_path / "a.gguf").mkdir()
    refused.prune(tmp_path / "a.gguf", ids, says=["a.gguf", "Is a directory"])


def test_bare_name_without_a_hub_fails_fast_and_quietly(refused, tmp_path, ids, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Port 9 of this host: refused at once, and no name is looked up.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    refused.prune("nobody/nothing", ids, says=["nobody/nothing: no such file", "Hub id", "refused"])
    refused.prune("nothing", ids, says="nothing: no such file")
    refused.prune("no name", ids, says=["no name: no such file", "Repo id must"])
    assert time.monotonic() - began < 5


def test_hub_id_in_the_cache_needs_no_hub(refused, tmp_path, ids, sound, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    repository = tmp_path / "models--nobody--tiny"
    shutil.copytree(sound, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    refused.prune("nobody/tiny", ids, "--length", 65, says="--length 65 is more than the model's 64 positions")


@pytest.mark.parametrize(
    ("file", "says"), [("config.json", "no config.json: not a checkpoint folder"), (WEIGHTS, "neither " + WEIGHTS)]
)
def test_folder_with_a_file_missing(refused, model, ids, file, says):
    (model / file).unlink()
    refused.prune(model, ids, says=[str(model), says])


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\xff", "[" * 100_000, "\0"])
def test_config_that_is_no_json_object(refused, model, ids, content):
    (model / "config.json").write_bytes(content.encode("latin-1"))
    refused.prune(model, ids, says=[str(model / "config.json"), "JSON", "fetch it again"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt9"}, "model_type 'gpt9' is not supported (known: "),
        ({"model_type": None}, "model_type None is not supported"),
        ({"architectures": ["FooModel"]}, "architecture 'FooModel'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": [32]}, "hidden_size must be a positive integer up to 2147483647, not [32]"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer up to 2147483647, not '32'"),
        ({"hidden_size": 10**30}, f"hidden_size must be a positive integer up to {2**31 - 1}, not {10**30}"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be a positive integer"),
        # Must not list the tensors of a thousand million layers before it looks for them.
        ({"num_hidden_layers": 10**9}, "tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "tensor model.layers.1."),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"vocab_size": 96}, "tensor model.embed_tokens.weight has shape [97, 32], config.json asks for [96, 32]"),
        ({"intermediate_size": 64}, "mlp.down_proj.weight has shape [32, 48], config.json asks for [32, 64]"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a finite number above 0, not 'tiny'"),
        ({"hidden_act": "foo"}, "activation 'foo'"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"attention_bias": True}, "k_proj.bias is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        # Each of these once ended in a traceback, or ran and gave NaN.
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"architectures": 5}, "architectures must be a list of names, not 5"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"hidden_act": ["silu"]}, "activation ['silu']"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a finite number above 0, not -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number above 0, not nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number above 0"),
        ({"rope_parameters": [1]}, "rope parameters must be an object, not [1]"),
        ({"rope_scaling": "linear"}, "rope parameters must be an object, not 'linear'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope parameter rope_theta must be a finite number above 0, not -1"),
        ({"rope_parameters": {"rope_theta": [1]}}, "rope parameter rope_theta must be"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope parameter factor must be"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "rope parameter factor must be"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, "low_freq_factor 1 must be below high_freq_factor 1"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "x"}},
            "original_max_position_embeddings must",
        ),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor x is not supported"),
        ({"max_position_embeddings": 4}, "--length 8 is more than the model's 4 positions"),
    ],
)
def test_config_entries(refused, model, ids, changes, says):
    edit_config(model, **changes)
    refused.prune(model, ids, says=says)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 3000, -1])
def test_truncated_safetensors(refused, model, ids, keep):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused.prune(model, ids, says=[str(path), "truncated or corrupt", "fetch it again"])


def test_corrupt_safetensors(refused, model, ids):
    path = model / WEIGHTS
    content = path.read_bytes()
    for damaged in (b"\xff" * 8 + content[8:], content[:10] + b"\xff" * 9 + content[19:]):
        path.write_bytes(damaged)
        refused.prune(model, ids, says=[str(path), "truncated or corrupt"])


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_gguf(refused, tmp_path, ids, keep):
    path = tmp_path / "model.gguf"
    test_gguf.write(path, test_gguf.gguf_tensors(test_gguf.hf_tensors()))
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    refused.prune(path, ids, says=[str(path), "download or convert the file again"])


def test_corrupt_gguf(refused, tmp_path, ids):
    path = tmp_path / "model.gguf"
    test_gguf.write(path, test_gguf.gguf_tensors(test_gguf.hf_tensors()))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"general.architecture", b"general.architectur\xff"))
    refused.prune(path, ids, says=[str(path), "header is damaged"])


def write_gguf(path, pre, merges):
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    fields |= {"tokenizer.ggml.tokens": ["a", "b", "ab", *map(str, range(37))]}
    fields |= {"tokenizer.ggml.token_type": [1] * 40}
    return test_gguf.write(path, test_gguf.gguf_tensors(test_gguf.hf_tensors()), fields)


def test_gguf_whose_tokenizer_is_damaged_is_refused_before_the_work(refused, tmp_path, ids):
    path = write_gguf(tmp_path / "model.gguf", "gpt-2", ["a x"])
    refused.prune(path, save(tmp_path, np.zeros((2, 8), int)), says=[str(path), "tokens and merges are inconsistent"])


def test_gguf_whose_tokenizer_is_not_known_is_pruned_on_ids(tmp_path, capsys):
    path, out = write_gguf(tmp_path / "model.gguf", "unheard-of", ["a b"]), tmp_path / "out"
    ids = save(tmp_path, np.zeros((2, 8), int))
    given = ["--ckpt", path, "--out", out, "--calibration", ids, "--samples", 2, "--length", 8, *QUICK]
    prune.run([str(argument) for argument in given])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no tokenizer is written")]
    assert len(said) == 1 and "'unheard-of'" in said[0]
    assert (out / "model.safetensors").exists() and not list(out.glob("tokenizer*"))


def test_missing_shard(refused, model, ids):
    shard(model)
    (model / SHARDS[1]).unlink()
    refused.prune(model, ids, says=[str(model / SHARDS[1]), INDEX, "fetch the missing shard"])


def test_tensor_that_its_shard_does_not_hold(refused, model, ids):
    table = shard(model)
    other = SHARDS[1 - SHARDS.index(table[UP])]
    (model / INDEX).write_text(json.dumps({"weight_map": table | {UP: other}}))
    refused.prune(model, ids, says=[str(model / other), f"no tensor {UP}"])


@pytest.mark.parametrize("place", ["../x.safetensors", "sub/x.safetensors", "", "config.json", 3, None, ["a"], "a\0b"])
def test_index_that_names_no_file_beside_it(refused, model, ids, place):
    # Shards keep their names in the output: `../x.safetensors` would be written outside of it.
    for path in (model / "../x.safetensors", model / "sub" / "x.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(model / WEIGHTS, path) if path.parent != model else None
    shard(model, **{UP: place})
    refused.prune(model, ids, says=[str(model / INDEX), repr(place), UP])


def test_index_with_an_absolute_path_cannot_overwrite_the_source(refused, model, ids):
    table = shard(model)
    (model / INDEX).write_text(json.dumps({"weight_map": {name: str(model / file) for name, file in table.items()}}))
    refused.prune(model, ids, says=[str(model / INDEX), "not the name of a .safetensors file"])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(refused, model, ids, content):
    shard(model)
    (model / INDEX).write_text(content)
    refused.prune(model, ids, says=[str(model / INDEX), "fetch it again"])


def test_shard_with_the_mask_files_name(refused, model, ids):
    (model / WEIGHTS).rename(model / "masks.safetensors")
    names = safetensors.numpy.load_file(model / "masks.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "masks.safetensors")}))
    refused.prune(model, ids, says=[str(model), "masks.safetensors", "rename the shard"])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(UP), [f"tensor {UP} is missing", "fetch"]),
        (lambda t: t.update({UP: t[UP][:-1].copy()}), [f"tensor {UP} has shape [47, 32]", "asks for [48, 32]"]),
        (lambda t: t.update({UP: t[UP].T.copy()}), [f"tensor {UP} has shape [32, 48]", "asks for [48, 32]"]),
        (lambda t: t.update({UP: t[UP].ravel().copy()}), [f"tensor {UP} has shape [1536]"]),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), [f"tensor {UP} has dtype I8", "known: F32"]),
        (lambda t: t.update(extra=t[UP].copy()), ["tensor extra does not belong"]),
    ],
)
def test_tensors_that_do_not_fit(refused, model, ids, edit, says):
    edit_tensors(model, edit)
    refused.prune(model, ids, says=[str(model), *says])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", UP, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_and_infinity(refused, model, ids, name, value):
    edit_tensors(model, lambda tensors: tensors[name].reshape(-1).__setitem__(5, value))
    says = [str(model), f"tensor {name} holds NaN or Inf"]
    refused.prune(model, ids, *QUICK, says=says, after_headline=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "wanda"], "block 0: the inputs of its linears are not finite"),
        (["--method", "wanda", "--rebuild"], "block 0: the inputs of its linears are not finite"),
        (["--method", "magnitude", "--rebuild"], "block 0, mlp: the loss is"),
        (["--method", "magnitude", "--refine", "2"], "block 0, mlp: the loss is"),
    ],
)
def test_overflow(refused, model, ids, options, says):
    """Finite weights whose products are not: every score and every choice would be empty from there on."""

    def edit(tensors):
        for linear in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{linear}.weight"] *= np.float32(1e22)

    edit_tensors(model, edit)
    refused.prune(model, ids, *QUICK, *options, says=[says], after_headline=True)


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sparsity", "1"], "--sparsity 1 is outside [0, 1)"),
        (["--sparsity", "-0.1"], "--sparsity -0.1 is outside"),
        (["--sparsity", "nan"], "--sparsity nan is outside"),
        (["--sparsity", "inf"], "--sparsity inf is outside"),
        (["--sparsity", "half"], "--sparsity: no type matching FLOAT could be instantiated from ['half']"),
        (["--pattern", "4:2"], "--pattern 4:2: keeping N of every M"),
        (["--pattern", "0:4"], "--pattern 0:4: keeping N of every M"),
        (["--pattern", "2:5"], "--pattern 2:5: 5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj"),
        (["--pattern", "4:32"], "does not divide the 48 inputs of model.layers.0.mlp.down_proj.weight"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "--sparsity 0.3 conflicts with --pattern 2:4, which means 0.5"),
        (["--pattern", "foo"], "--pattern 'foo' is neither 'unstructured' nor N:M"),
        (["--pattern", "2:4:8"], "--pattern '2:4:8' is neither"),
        (["--pattern", "٢:٤"], "is neither 'unstructured' nor N:M"),
        (["--pattern", "2:" + "9" * 5000], "is neither 'unstructured' nor N:M"),
        (
            ["--pattern", "2:4", "--granularity", "block"],
            "--granularity block: N:M patterns are rebuilt within an output; use output1",
        ),
        (["--pattern", "2:4", "--granularity", "layer"], "use output1"),
        (["--pattern", "2:4", "--granularity", "input1"], "use output1"),
        (["--alpha", "1.5"], "--alpha 1.5 is outside [0, 1]"),
        (["--alpha", "-1"], "--alpha -1 is outside"),
        (["--alpha", "nan"], "--alpha nan is outside"),
        (["--length", "65"], "--length 65 is more than the model's 64 positions"),
        (["--length", "1"], "--length 1 leaves no next token"),
        (["--length", "0"], "--length 0 must be at least 1"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--samples", "-3"], "--samples -3 must be at least 1"),
        (["--samples", "abc"], "--samples: invalid literal for int() with base 10: 'abc'"),
        (["--samples"], "Missing value for argument '--samples'"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--batch", "-1"], "--batch -1 must be at least 1"),
        (["--method", "foo"], "invalid choice 'foo' for argument '--method'. Expected one of ("),
        (["--metric", "x"], "invalid choice 'x' for argument '--metric'"),
        (["--compute-dtype", "int8"], "invalid choice 'int8' for argument '--compute-dtype'"),
        (["--foo"], "Unrecognized options: --foo"),
        (["--ovewrite"], "Unrecognized options: --ovewrite (perhaps you meant --overwrite)"),
        (["extra"], "Unrecognized options: extra"),
        (["--eval-text", "a.txt", "--eval-dataset", "ptb"], "--eval-text and --eval-dataset: give one of them"),
        (["--eval-windows", "0"], "--eval-windows 0 must be at least 1"),
        (["--eval-windows", "3"], "--eval-windows needs --eval-text or --eval-dataset"),
        (["--eval-text", "gone.txt"], "gone.txt: no such file or folder"),
    ],
)
def test_options(refused, sound, ids, options, says):
    refused.prune(sound, ids, *options, says=says)


def test_errors_of_the_parser_name_the_help(refused, sound, ids):
    for option in (["--foo"], ["--samples", "abc"], ["--method", "foo"]):
        refused.prune(sound, ids, *option, says="; see python -m barber_jax.prune --help")


def test_missing_required_options(capsys):
    for arguments, line in [([], "missing --ckpt, --out; see"), (["--ckpt", "x"], "missing --out; see")]:
        with pytest.raises(SystemExit):
            exit_with_one_line(lambda arguments=arguments: prune.run(arguments))
        assert line in capsys.readouterr().err


def test_every_program_of_the_package_is_a_command_of_barber_jax():
    top = Path(sys.modules["barber_jax"].__file__).parent
    programs = {file.stem for file in top.glob("*.py") if "\ndef run(" in file.read_text(encoding="utf-8")}
    assert {"prune", "recover", "report"} <= programs <= {name for name in COMMANDS}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_of_barber_jax_answers_help_and_refuses_nonsense(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["barber-jax", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        dispatch()
    assert not stop.value.code
    assert f"python -m {COMMANDS[name][0].removesuffix('.__main__')} " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["barber-jax", name, "--nonsense"])
    with pytest.raises(BarberError, match="; see python -m "):
        dispatch()


def test_the_demo_begins_nothing_where_its_options_are_wrong(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        demo.run(["--help"])
    with pytest.raises(BarberError, match=r"--nonsense; see python -m barber_jax\.eval\.demo --help"):
        demo.run(["--nonsense"])
    assert not list(tmp_path.iterdir())


# Calibration


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((1, 8), int), ["1 rows, but --samples is 2", "lower it"]),
        (np.zeros((2, 7), int), ["7 columns, but --length is 8", "lower it"]),
        (np.zeros((0, 8), int), ["holds no ids"]),
        (np.zeros((2, 8)), ["holds float64", "int32"]),
        (np.zeros((2, 8), bool), ["holds bool"]),
        (np.full((2, 8), 97), ["id 97 at [0, 0]", "[0, 97)"]),
        (np.full((2, 8), -1), ["id -1 at [0, 0]"]),
        # Would come round to 0 in int32.
        (np.full((2, 8), 2**32), [f"id {2**32} at [0, 0]"]),
        (np.zeros(16, int), ["shape (16,)", "[samples, length]"]),
    ],
)
def test_calibration_ids(refused, sound, tmp_path, array, says):
    path = save(tmp_path, array)
    refused.prune(sound, path, says=[str(path), *says])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.npy", None, "no such file"),
        ("gone", None, "neither a dataset (c4, wikitext2, ptb) nor a file"),
        ("ids.npy", b"text", "cannot be read as .npy"),
        ("ids.npy", b"", "cannot be read as .npy"),
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"w1 w2 w3", "3 tokens, but 2 samples of 8 need 16; lower --samples"),
        ("a.csv", b"text", "unknown suffix '.csv'"),
        ("a.jsonl", b'{"title": "w1"}', "name one of them with --text-field"),
    ],
)
def test_calibration_files(refused, sound, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused.prune(sound, tmp_path / name, says=[name, says])


def test_calibration_folder_and_empty_name(refused, sound, tmp_path):
    (tmp_path / "data").mkdir()
    refused.prune(sound, tmp_path / "data", says=[str(tmp_path / "data"), "not a folder of datasets.save_to_disk"])
    refused.prune(sound, "", says="--calibration is empty")


def test_text_without_a_tokenizer(refused, model, tmp_path):
    (tmp_path / "a.txt").write_text("w1 " * 99)
    (model / "tokenizer.json").write_text("{")
    refused.prune(model, tmp_path / "a.txt", says=[str(model), "no usable tokenizer"])
    (model / "tokenizer.json").unlink()
    refused.prune(model, tmp_path / "a.txt", says=[str(model), "no tokenizer there", "token ids (.npy)"])


def test_evaluation_text_is_tried_before_the_work(refused, model, ids, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("w1 " * 9)
    refused.prune(model, ids, "--eval-text", text, "--eval-windows", 2, says=[str(text), "9 tokens give 1 windows"])
    # A tokenizer with more words than the model has.
    edit_config(model, vocab_size=90)
    edit_tensors(model, lambda t: t.update({n: v[:90].copy() for n, v in t.items() if v.shape[0] == 97}))
    text.write_text("w1 w95 " * 9)
    small = save(tmp_path, np.zeros((2, 8), int))
    refused.prune(model, small, "--eval-text", text, says=[str(text), "id 95 at [0, 1]", "[0, 90)"])


# The destination


def test_out_that_exists(refused, sound, ids, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused.prune(sound, ids, says=[f"--out {out} exists", "--overwrite"])
    (out / "thesis.txt").write_text("years of work")
    refused.prune(sound, ids, "--overwrite", says=[f"--out {out}", "not the result of an earlier run"])
    file = out / "thesis.txt"
    refused.prune(sound, ids, "--overwrite", out=file, says=[f"--out {file}", "is a file"])
    refused.prune(sound, ids, out=file / "deeper", says=f"cannot write {file / 'deeper'}")
    refused.prune(sound, ids, out=tmp_path / ("a" * 250), says="File name too long")


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_out_among_the_inputs(refused, model, ids, tmp_path, options, monkeypatch):
    (model / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for out in (
        model,
        model / "out",
        tmp_path / "link",
        tmp_path / "link" / "out",
        f"{model}/",
        tmp_path / "x/../model",
    ):
        refused.prune(model, ids, *options, out=out, says=["--out", "is or is inside", "choose another folder"])
    refused.prune(tmp_path / "link", ids, *options, out=model / "out", says="is or is inside")
    refused.prune(
        model, ids, *options, out=tmp_path, says=[f"--out {tmp_path} contains {model}", "choose another folder"]
    )
    (tmp_path / "data").mkdir()
    moved = shutil.move(ids, tmp_path / "data" / "ids.npy")
    refused.prune(model, moved, *options, out=tmp_path / "data", says=["contains", str(moved)])
    monkeypatch.chdir(model)
    refused.prune(".", moved, *options, out="out", says="is or is inside")
    refused.prune(".", moved, *options, out=".", says="is or is inside")


def test_failed_overwrite_leaves_the_old_result(refused, model, ids, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"old": true}')
    edit_tensors(model, lambda tensors: tensors[UP].__setitem__((0, 0), np.nan))
    refused.prune(model, ids, "--overwrite", *QUICK, says=f"tensor {UP}", after_headline=True)


def test_overwrite_replaces_the_result_and_nothing_beside_it(sound, ids, tmp_path):
    for folder in ("out", "out.old", "out.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text("{}")
    given = ["--ckpt", sound, "--out", f"{tmp_path}/out/", "--calibration", ids, "--samples", 2, "--length", 8]
    prune.run([str(argument) for argument in [*given, "--overwrite", *QUICK]])
    # out.partial was what a killed run leaves.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out", "out.old"]
    assert (tmp_path / "out.old" / "run.json").read_text() == "{}"
    assert HFFolder(tmp_path / "out").names()


def test_old_result_comes_back_when_the_new_one_cannot_take_its_place(sound, tmp_path, monkeypatch):
    rename = Path.rename

    def refusing(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("old")
    with (
        pytest.raises(BarberError, match=f"cannot write {out}"),
        FolderWriter(out, HFFolder(sound), [], "x", 0) as writer,
    ):
        writer.publish()
    assert snapshot(tmp_path) == {out: None, out / "run.json": b"old"}


@contextlib.contextmanager
def file_size_limit(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(("size", "file"), [(300, "config.json"), (1000, "tokenizer.json"), (20_000, WEIGHTS)])
def test_full_disk_names_the_file(refused, sound, ids, tmp_path, size, file):
    with file_size_limit(size):
        refused.prune(
            sound, ids, says=[f"cannot write {tmp_path / 'out.partial' / file}: File too large", "write to another"]
        )


def test_full_disk_while_the_tokenizer_of_a_gguf_is_written(refused, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    test_gguf.write(path, test_gguf.gguf_tensors(test_gguf.hf_tensors()))

    def save_tokenizer(self, folder):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("barber_jax.convert.gguf_file.GGUFCheckpoint.save_tokenizer", save_tokenizer)
    says = [f"cannot write the tokenizer into {tmp_path / 'out.partial'}: No space left", "make room"]
    refused.prune(path, save(tmp_path, np.zeros((2, 8), int)), says=says)


# Perplexity


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --text, --tokens or --dataset"),
        (["--tokens", "ids.npy", "--mesh", "4x2"], "--mesh '4x2'"),
        (["--text", "gone.txt"], "gone.txt: no such file or folder"),
        (["--tokens", "gone.npy"], "gone.npy: no such file"),
        (["--tokens", "ids.npy", "--length", "65"], "--length 65 is more than the model's 64 positions"),
        (["--tokens", "ids.npy", "--length", "1"], "--length 1 leaves no next token"),
        (["--tokens", "ids.npy", "--length", "x"], "--length: invalid literal"),
        (["--tokens", "ids.npy", "--windows", "17"], "128 tokens give 16 windows of --length 8, not 17"),
        (["--tokens", "ids.npy", "--windows", "0"], "--windows 0 must be at least 1"),
        (["--tokens", "ids.npy", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--tokens", "ids.npy", "--json", "gone/a.json"], "--json gone/a.json is a folder or its folder"),
        (["--tokens", "ids.npy", "--json", "."], "--json . is a folder"),
        (["--tokens", "ids.npy", "--foo"], "Unrecognized options: --foo"),
        (["--dataset", "foo"], "invalid choice 'foo' for argument '--dataset'"),
    ],
)
def test_perplexity_options(refused, sound, ids, monkeypatch, options, says):
    monkeypatch.chdir(ids.parent)
    refused.perplexity(sound, *([] if "--length" in options else ["--length", 8]), *options, says=says)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(64), "holds float64"),
        (np.full(64, 97), "id 97 at [0, 0] is outside the model's vocabulary [0, 97)"),
        (np.full(64, -1), "id -1 at [0, 0]"),
        (np.full(64, 2**40), f"id {2**40} at [0, 0]"),
        (np.zeros(7, int), "7 tokens give 0 windows of --length 8"),
        (np.zeros(0, int), "holds no ids"),
    ],
)
def test_perplexity_ids(refused, sound, tmp_path, array, says):
    path = save(tmp_path, array)
    refused.perplexity(sound, "--length", 8, "--tokens", path, says=[str(path), says])


def test_perplexity_of_a_damaged_checkpoint(refused, model, ids, tmp_path):
    refused.perplexity(
        tmp_path / "gone", "--length", 8, "--tokens", ids, says=[str(tmp_path / "gone"), "check the path"]
    )
    edit_tensors(model, lambda tensors: tensors["model.embed_tokens.weight"].__setitem__((0, 0), np.nan))
    says = [str(model), "embed_tokens.weight holds NaN"]
    refused.perplexity(model, "--length", 8, "--tokens", ids, says=says, midway=True)
    edit_tensors(model, lambda tensors: tensors.pop(UP))
    refused.perplexity(model, "--length", 8, "--tokens", ids, says=[str(model), f"tensor {UP} is missing"])


# Processes of their own


def one_line(process, says):
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert says in process.stderr


def test_processes(sound, tmp_path):
    one_line(command("prune", "--ckpt", tmp_path / "gone", "--out", tmp_path / "out"), f"{tmp_path / 'gone'}: no such")
    one_line(command("eval.perplexity", "--ckpt", sound), "missing --length; see python -m barber_jax.eval.perplexity")
    assert list(tmp_path.iterdir()) == []


def in_process(setup, *arguments):
    """The prune command after some lines of set-up in a process of its own."""
    imports = "from barber_jax import prune\nfrom barber_jax.console.errors import exit_with_one_line"
    code = f"import sys; {setup}\n{imports}\nexit_with_one_line(prune.run)"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_full_disk_in_a_process(sound, ids, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    given = ["--ckpt", sound, "--out", tmp_path / "out", "--calibration", ids, "--samples", 2, "--length", 8]
    process = in_process(limit, *given)
    out, err = process.communicate(timeout=60)
    where = tmp_path / "out.partial" / WEIGHTS
    one_line(subprocess.CompletedProcess([], process.returncode, out, err), f"cannot write {where}: File too large")
    assert list(tmp_path.iterdir()) == [ids]


def test_interrupt_leaves_nothing_unfinished(sound, ids, tmp_path):
    # A shell may have set its background jobs to ignore the signal.
    setup = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    given = ["--ckpt", sound, "--out", tmp_path / "out", "--calibration", ids, "--samples", 2, "--length", 8]
    process = in_process(setup, *given)
    while not (tmp_path / "out.partial" / "masks.safetensors.partial").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted" and "Traceback" not in err
    # The first block may be finished by then; it is kept, and that is said.
    kept = [tmp_path / "out.run"] if "blocks are kept in" in err else []
    assert sorted(tmp_path.iterdir()) == [ids, *kept]


def test_a_lost_interrupt_ends_the_run_at_the_next_block(sound, ids, tmp_path):
    # What is raised in the callback of a weak reference goes no further; JAX has such callbacks.
    setup = """
import signal, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from barber_jax.run import loop
apart = loop.Pruning.__iter__
def interrupted(self):
    for result in apart(self):
        class Gone: pass
        gone = Gone()
        kept = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))
        del gone
        print("lost", flush=True)
        yield result
loop.Pruning.__iter__ = interrupted
"""
    given = ["--ckpt", sound, "--out", tmp_path / "out", "--calibration", ids, "--samples", 2, "--length", 8]
    out, err = (process := in_process(setup, *given)).communicate(timeout=60)
    assert out == "lost\n" and err.splitlines()[-1] == "error: interrupted"
    assert "Exception ignored" not in err and "Traceback" not in err
    assert process.returncode == 130 and "1 of 2 blocks are kept in" in err
