"""Checkpoint formats: .bin and Orbax in, Orbax out, conversion; bits are kept, and what is damaged is refused."""

import json
import os
import resource
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import test_gguf
from checkpoints import BASE, IDS, assert_same_logits, logits, our_logits, torch, write_model, write_reference
from cli import command, prune_masks
from flax import nnx
from recovered import recover_json, write_recovered
from safetensors.numpy import save_file

from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.convert import __main__ as converter
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.download import download_patterns
from barber_jax.convert.hf_folder import INDEX, WEIGHTS, HFFolder
from barber_jax.convert.orbax_folder import ORBAX, OrbaxCheckpoint, write_orbax
from barber_jax.convert.torch_bin import TorchBinFolder
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model
from barber_jax.reports.recover_record import read_recover_record

SMALL = ["--samples", 4, "--length", 16, "--alpha", 0.5]
QUICK = ["--method", "magnitude", "--no-rebuild"]


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(1).integers(0, 40, (4, 16)))
    return path


@pytest.fixture
def dense(tmp_path):
    write_model(tmp_path / "dense")
    return tmp_path / "dense"


def convert(source, out, *options):
    converter.run([str(argument) for argument in ("--ckpt", source, "--out", out, *options)])
    return out


def tensors(spec):
    checkpoint = open_checkpoint(str(spec))
    return {name: checkpoint.fetch(name) for name in checkpoint.names()}


def assert_same_bits(given, wanted):
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (given[name].dtype, given[name].shape) == (value.dtype, value.shape), name
        assert given[name].tobytes() == value.tobytes(), name


def to_bin(source, folder, shards=1, **options):
    """The model of a safetensors folder as PyTorch would have saved it."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    state = torch_state(source)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    table = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
    for file in set(table.values()):
        torch.save({name: value for name, value in state.items() if table[name] == file}, folder / file, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def torch_state(source):
    state = {}
    for name, value in tensors(source).items():
        if value.dtype == ml_dtypes.bfloat16:
            state[name] = torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(np.array(value))
    return state


# Round trips


MODELS = [
    ("llama", dict()),
    ("llama", dict(tie_word_embeddings=True, dtype="bfloat16")),
    ("llama", dict(attention_bias=True, mlp_bias=True, dtype="float16", shard_size=20_000)),
    ("opt", dict()),
    ("opt", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
]


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_every_format_keeps_every_bit(tmp_path, family, changes):
    write_model(tmp_path / "hf", family, **changes)
    wanted = tensors(tmp_path / "hf")
    binary = to_bin(tmp_path / "hf", tmp_path / "bin", shards=2)
    orbax = convert(binary, tmp_path / "orbax", "--format", "orbax")
    both = convert(orbax, tmp_path / "both", "--format", "both")
    back = convert(both, tmp_path / "back")
    for folder, kind in [(binary, TorchBinFolder), (orbax, OrbaxCheckpoint), (both, HFFolder), (back, HFFolder)]:
        assert type(open_checkpoint(str(folder))) is kind
        assert_same_bits(tensors(folder), wanted)
    assert not list(orbax.glob("*.safetensors*")) and not (back / ORBAX).exists()
    assert json.loads((back / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_shards_of_bin_become_shards_of_safetensors(tmp_path, dense):
    binary = to_bin(dense, tmp_path / "bin", shards=2)
    table = json.loads((binary / "pytorch_model.bin.index.json").read_text())["weight_map"]
    out = convert(binary, tmp_path / "out")
    written = json.loads((out / INDEX).read_text())["weight_map"]
    renamed = {name: f.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name, f in table.items()}
    assert written == renamed
    assert {path.name for path in out.glob("*.safetensors")} == set(written.values())


def test_safetensors_win_over_bin_and_orbax(tmp_path, dense):
    write_orbax(dense, HFFolder(dense), None)
    torch.save({"nonsense": torch.zeros(1)}, dense / "pytorch_model.bin")
    assert type(open_checkpoint(str(dense))) is HFFolder
    (dense / WEIGHTS).unlink()
    assert type(open_checkpoint(str(dense))) is TorchBinFolder


def test_masks_run_record_and_companions_go_along(tmp_path, dense, ids):
    for file in ("tokenizer.json", "generation_config.json"):
        (dense / file).write_text("{}")
    pruned = tmp_path / "pruned"
    prune_masks(pruned, dense, ids, *SMALL, *QUICK)
    orbax = convert(pruned, tmp_path / "orbax", "--format", "orbax")
    back = convert(orbax, tmp_path / "back")
    for file in ("masks.safetensors", "tokenizer.json", "generation_config.json"):
        assert (back / file).read_bytes() == (pruned / file).read_bytes()
    assert_same_bits(tensors(back), tensors(pruned))
    record = json.loads((back / "run.json").read_text())
    assert record["converted"]["ckpt"] == str(orbax)
    assert record["blocks"] == json.loads((pruned / "run.json").read_text())["blocks"]


def test_the_record_of_a_recovery_goes_along(tmp_path, dense):
    written = recover_json()
    write_recovered(dense, written)
    (dense / "masks.safetensors").unlink()
    both = convert(dense, tmp_path / "both", "--format", "both")
    back = convert(both, tmp_path / "back")
    assert not (back / "run.json").exists()
    assert json.loads((back / "recover.json").read_text())["converted"]["ckpt"] == str(both)
    # What reads it takes no notice of the note; the folder may be replaced like any other result.
    assert read_recover_record(back)["evaluations"] == written["evaluations"]
    convert(dense, back, "--overwrite")
    # A folder that was pruned, converted and recovered elsewhere may have both.
    (dense / "run.json").write_text('{"blocks": 7}')
    convert(dense, back, "--overwrite")
    assert json.loads((back / "run.json").read_text())["blocks"] == 7 and (back / "recover.json").exists()


def test_convert_from_the_command_line_replaces_only_its_own(tmp_path, dense):
    out = tmp_path / "out"
    said = command("convert", "--ckpt", dense, "--out", out, "--format", "both")
    assert said.returncode == 0 and said.stderr == "", said.stderr
    said = command("convert", "--ckpt", dense, "--out", out)
    assert said.returncode == 2 and said.stderr.startswith("error: ") and "--overwrite" in said.stderr
    convert(dense, out, "--overwrite")
    assert not (out / ORBAX).exists()
    with pytest.raises(BarberError, match="which the run reads"):
        convert(dense, dense, "--overwrite")


# Pruning from and to every format


def test_same_masks_from_every_format_of_mixed_dtypes(tmp_path, dense, ids):
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    mixed = {name: value.astype(kinds[i % 3]) for i, (name, value) in enumerate(sorted(tensors(dense).items()))}
    save_file(mixed, dense / WEIGHTS, {"format": "pt"})
    masks = prune_masks(tmp_path / "from_hf", dense, ids, *SMALL)
    pruned = {name: np.where(masks[name], value, value.dtype.type(0)) for name, value in mixed.items() if name in masks}
    assert len({value.dtype for value in pruned.values()}) == 3
    assert_same_bits(tensors(tmp_path / "from_hf"), mixed | pruned)
    sources = {
        "bin": to_bin(dense, tmp_path / "bin"),
        "orbax": convert(dense, tmp_path / "orbax", "--format", "orbax"),
    }
    for name, source in sources.items():
        assert_same_bits(prune_masks(tmp_path / f"from_{name}", source, ids, *SMALL), masks)
        assert_same_bits(tensors(tmp_path / f"from_{name}"), mixed | pruned)


def test_same_masks_from_gguf_and_its_conversions(tmp_path, ids):
    gguf = test_gguf.write(
        tmp_path / "m.gguf", test_gguf.gguf_tensors(test_gguf.hf_tensors()), kind=test_gguf.Kind.Q8_0
    )
    wanted = prune_masks(tmp_path / "from_gguf", gguf, ids, *SMALL, "--no-rebuild")
    for form in ("hf", "orbax"):
        source = convert(gguf, tmp_path / form, "--format", form)
        assert_same_bits(prune_masks(tmp_path / f"from_{form}", source, ids, *SMALL, "--no-rebuild"), wanted)


def test_format_option_of_prune(tmp_path, dense, ids):
    for form in ("hf", "orbax", "both"):
        prune_masks(tmp_path / form, dense, ids, *SMALL, *QUICK, "--format", form)
    wanted = tensors(tmp_path / "hf")
    for form, safe, orbax in [("hf", True, False), ("orbax", False, True), ("both", True, True)]:
        out = tmp_path / form
        assert ((out / WEIGHTS).exists(), (out / INDEX).exists(), (out / ORBAX).exists()) == (safe, safe, orbax)
        assert (out / "masks.safetensors").exists() and (out / "config.json").exists()
        assert json.loads((out / "run.json").read_text())["options"]["format"] == form
        assert_same_bits(tensors(out), wanted)
    np.testing.assert_array_equal(our_logits(tmp_path / "orbax"), our_logits(tmp_path / "hf"))


def test_orbax_holds_decoders_tree_and_the_masks(tmp_path, ids):
    reference = write_reference(tmp_path / "dense", tie_word_embeddings=True)
    masks = prune_masks(tmp_path / "out", tmp_path / "dense", ids, *SMALL, *QUICK, "--format", "both")
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "out" / ORBAX)
    model = build_model(open_checkpoint(str(tmp_path / "out")).config, jnp.dtype("float32"))
    names = {f"{i}.{path}": name for i in range(model.layers) for path, name in model.kernel_names(i).items()}
    stored = nnx.traversals.flatten_mapping(tree["masks"]["layers"], sep=".")
    assert_same_bits({names[path]: np.ascontiguousarray(mask.T) for path, mask in stored.items()}, masks)

    params = tree["params"]
    assert "lm_head" not in params["head"]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model.decoder(nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
    ours = np.asarray(nnx.merge(graphdef, state)(jnp.asarray(IDS[0])))
    np.testing.assert_allclose(ours, our_logits(tmp_path / "out"), atol=1e-4, rtol=0)
    assert np.abs(ours - logits(reference, IDS[0])).max() > 0.1


# PyTorch's .bin


def test_bin_with_a_tied_head_parameters_and_odd_strides(tmp_path):
    reference = write_reference(tmp_path / "hf", tie_word_embeddings=True)
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copyfile(tmp_path / "hf" / "config.json", folder / "config.json")
    state = dict(reference.state_dict())
    assert "lm_head.weight" in state
    up = "model.layers.0.mlp.up_proj.weight"
    state[up] = torch.nn.Parameter(state[up].T.contiguous().T)
    torch.save(state, folder / "pytorch_model.bin")
    given = tensors(folder)
    assert_same_bits(given, {**tensors(tmp_path / "hf"), "lm_head.weight": given["model.embed_tokens.weight"]})
    assert_same_logits(folder, reference)
    orbax = convert(folder, tmp_path / "orbax", "--format", "orbax")
    assert_same_bits(tensors(orbax), tensors(tmp_path / "hf"))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_names_without_the_models_prefix(tmp_path, family):
    reference = write_reference(tmp_path / "hf", family, tie_word_embeddings=True)
    folder = to_bin(tmp_path / "hf", tmp_path / "bin")
    state = {name.removeprefix("model."): value for name, value in torch_state(tmp_path / "hf").items()}
    (embedding,) = (value for name, value in state.items() if name.endswith("embed_tokens.weight"))
    torch.save(state | {"lm_head.weight": embedding}, folder / "pytorch_model.bin")
    assert_same_logits(folder, reference)
    assert_same_logits(convert(folder, tmp_path / "out"), reference)


def test_old_bin_files(tmp_path, dense):
    folder = to_bin(dense, tmp_path / "bin", shards=2, _use_new_zipfile_serialization=False)
    assert_same_bits(tensors(folder), tensors(dense))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_bin_that_would_run_code_is_refused(tmp_path, dense, ids, zipped, alone, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, trace = to_bin(dense, tmp_path / "bin"), tmp_path / "trace"
    state = Malicious(trace) if alone else torch_state(dense) | {"extra": Malicious(trace)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        BarberError, match=r"pytorch_model\.bin: refused: .* asks to run \w+\.system; nothing of it was"
    ):
        prune_masks(tmp_path / "out", folder, ids, *SMALL)
    assert not trace.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_bin(tmp_path, dense, zipped, keep):
    folder = to_bin(dense, tmp_path / "bin", _use_new_zipfile_serialization=zipped)
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(BarberError, match=r"pytorch_model\.bin: truncated or corrupt PyTorch file"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: [torch.zeros(2)], "holds no tensors by name"),
        (dict, "holds no tensors by name"),
        (lambda: {"state_dict": {"a": torch.zeros(2)}}, "'state_dict' in it is not a tensor"),
        (lambda: {"model.norm.weight": torch.zeros(2, dtype=torch.int32)}, "is missing"),
        (lambda: {3: torch.zeros(2)}, "3 in it is not a tensor"),
    ],
)
def test_bin_that_holds_something_else(tmp_path, dense, content, says):
    folder = to_bin(dense, tmp_path / "bin")
    torch.save(content(), folder / "pytorch_model.bin")
    with pytest.raises(BarberError, match=says):
        convert(folder, tmp_path / "out")


def test_bin_index_is_checked(tmp_path, dense):
    folder = to_bin(dense, tmp_path / "bin", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    table = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": table | {"model.norm.weight": "../elsewhere.bin"}}))
    with pytest.raises(BarberError, match=r"not the name of a \.bin file beside it"):
        open_checkpoint(str(folder))
    index.write_text(json.dumps({"weight_map": table}))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(BarberError, match=r"pytorch_model-00002-of-00002\.bin: named in .* but not there"):
        open_checkpoint(str(folder))


def test_without_torch_the_message_names_the_extra(tmp_path, dense):
    folder = to_bin(dense, tmp_path / "bin")
    program = (
        "import pathlib, sys; sys.modules['torch'] = None\n"
        "from barber_jax.convert.__main__ import ConvertConfig, convert\n"
        "from barber_jax.console.errors import exit_with_one_line\n"
        "exit_with_one_line(lambda: convert(ConvertConfig(sys.argv[1], pathlib.Path(sys.argv[2]))))"
    )

    def run(source):
        line = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    said = run(folder)
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1, said.stderr
    assert said.stderr.startswith("error: ") and "pip install 'barber_jax[torch]'" in said.stderr
    # Only .bin needs it.
    assert run(dense).returncode == 0


def test_torch_that_is_not_safe_is_refused(tmp_path, dense, monkeypatch):
    folder = to_bin(dense, tmp_path / "bin")
    monkeypatch.setattr(pytest.importorskip("torch"), "__version__", "2.5.1+cpu")
    with pytest.raises(BarberError, match=r"PyTorch 2\.5\.1\+cpu does not read \.bin files safely: pip install -U"):
        open_checkpoint(str(folder))


def test_hub_fetches_one_format():
    both = ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert "pytorch_model.bin" not in download_patterns(both) and "model.safetensors" in download_patterns(both)
    assert "masks.safetensors" in download_patterns(both)
    assert "pytorch_model-*.bin" in download_patterns(["config.json", "pytorch_model.bin.index.json"])
    # Nor the shards beside the one file that is opened.
    assert "model-*.safetensors" not in download_patterns([*both, INDEX, "model-00001-of-00002.safetensors"])


# Damaged Orbax


@pytest.fixture
def orbax(tmp_path, dense):
    return convert(dense, tmp_path / "orbax", "--format", "orbax")


def refusal(capsys, source, out):
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: convert(source, out))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and said.startswith("error: "), said
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return said


# An exception that nobody waits for would be printed after the one line.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_orbax_without_its_files(orbax, capsys, tmp_path):
    out = tmp_path / "out"
    for path in sorted(path for path in (orbax / ORBAX).rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        try:
            given = tensors(orbax)
        except BarberError:
            assert str(orbax / ORBAX) in refusal(capsys, orbax, out)
        else:
            # Some files are notes that reading needs not; what is read without them is whole.
            assert_same_bits(given, tensors(tmp_path / "dense"))
        path.write_bytes(content)
    shutil.rmtree(orbax / ORBAX)
    (orbax / ORBAX).mkdir()
    assert "not an Orbax checkpoint" in refusal(capsys, orbax, out)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_orbax_with_damaged_files(orbax, tmp_path):
    wanted, refused = tensors(orbax), 0
    files = sorted(path for path in (orbax / ORBAX).rglob("*") if path.is_file())
    for number, path in enumerate(files):
        content = path.read_bytes()
        path.write_bytes([content[: len(content) // 2], b"\xff" * len(content), b""][number % 3])
        try:
            assert_same_bits(tensors(orbax), wanted)
        except BarberError as error:
            assert str(orbax / ORBAX) in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(content)
    assert refused > len(files) / 4


def test_orbax_without_config(orbax, capsys, tmp_path):
    (orbax / "config.json").unlink()
    assert "no config.json" in refusal(capsys, orbax, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, r"params\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 10**9}, r"params\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"params\.layers\.1\.\S+ does not belong"),
        ({"vocab_size": 98}, r"has shape \[97, 32\], config\.json asks for \[98, 32\]"),
    ],
)
def test_orbax_of_another_model(orbax, tmp_path, changes, says):
    path = orbax / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BarberError, match=says):
        convert(orbax, tmp_path / "out")


def test_orbax_written_by_something_else(orbax, capsys, tmp_path):
    shutil.rmtree(orbax / ORBAX)
    ocp.PyTreeCheckpointer().save(orbax / ORBAX, {"weights": [np.zeros(3)]})
    assert "not an Orbax checkpoint written by barber_jax" in refusal(capsys, orbax, tmp_path / "out")


def test_masks_that_do_not_fit_are_not_written(tmp_path, dense, ids):
    prune_masks(tmp_path / "pruned", dense, ids, *SMALL, *QUICK)
    file = tmp_path / "pruned" / "masks.safetensors"
    write_model(tmp_path / "wider", intermediate_size=BASE["intermediate_size"] * 2)
    with pytest.raises(BarberError, match="fits no weight of"):
        write_orbax(tmp_path / "orbax", HFFolder(tmp_path / "wider"), read_masks(file))
    # As left behind where other weights were copied over those of a result, of another model or of this one.
    for name, says in (
        ("wider", r"mask model\.layers\.0\.mlp\.\w+\.weight has shape"),
        ("same", "is not zero everywhere"),
    ):
        if name == "same":
            write_model(tmp_path / name)
        shutil.copyfile(file, tmp_path / name / file.name)
        for form in ("hf", "orbax"):
            with pytest.raises(BarberError, match=says):
                convert(tmp_path / name, tmp_path / "out", "--format", form)
            assert not (tmp_path / "out").exists()
    assert read_masks(file).names()


def test_a_full_disk_is_one_line_without_what_orbax_logs(tmp_path, dense, capfd, caplog):
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(BarberError, match=r"cannot write .*out/orbax: .*; make room there"):
            write_orbax(tmp_path / "out", HFFolder(dense), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr() == ("", "") and not caplog.records
