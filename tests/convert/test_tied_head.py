"""config.json ties head and embedding or does not, and either or both are stored: what is used, in every format."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import test_gguf as gguf
import transformers
from checkpoints import IDS, assert_same_logits, logits, torch, write_model
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import PyTreeCheckpointer
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert import __main__ as converter
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.hf_folder import WEIGHTS
from barber_jax.convert.orbax_folder import ORBAX, tree_paths
from barber_jax.convert.parameters import check_tensors, to_flax
from barber_jax.devices.mesh import Devices
from barber_jax.eval.perplexity import PerplexityConfig, evaluate
from barber_jax.forward.resident import ResidentModel
from barber_jax.models import build_model

HEAD = "lm_head.weight"
TIED_BY_DEFAULT = {"llama": False, "opt": True}
STORED = ("embedding", "head", "equal", "different")


def embedding_name(names):
    (name,) = {name for name in names if name.endswith("embed_tokens.weight")} or {None}
    return name


def source(folder, family, tie, stored):
    """config.json in `folder`, with `tie` unless None, and the tensors of which it speaks, not yet written."""
    write_model(folder, family, tie_word_embeddings=False)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    config |= {} if tie is None else {"tie_word_embeddings": tie}
    (folder / "config.json").write_text(json.dumps(config))
    embedding = embedding_name(tensors)
    if stored == "equal":
        tensors[HEAD] = tensors[embedding].copy()
    if stored in ("embedding", "head"):
        del tensors[HEAD if stored == "embedding" else embedding]
    return tensors


def write_safetensors(folder, tensors):
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def write_bin(folder, tensors):
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "pytorch_model.bin")


def write_orbax(folder, tensors):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    paths = {name: path for path, name in tree_paths(build_model(config, jnp.dtype("float32")))}
    leaves = {("params", *paths[name].split(".")): to_flax(paths[name], value) for name, value in tensors.items()}
    PyTreeCheckpointer().save(folder.resolve() / ORBAX, unflatten_dict(leaves))


FORMATS = {"safetensors": write_safetensors, "bin": write_bin, "orbax": write_orbax}


@pytest.fixture
def write(tmp_path):
    def write(family="llama", tie=True, stored="different", form="safetensors"):
        folder = tmp_path / f"{family}_{tie}_{stored}_{form}"
        tensors = source(folder, family, tie, stored)
        FORMATS[form](folder, tensors)
        return folder, tensors

    return write


def opened(folder):
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    check_tensors(checkpoint, model)
    return checkpoint, model


def head_name(model):
    return model.names.head["lm_head.kernel"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", TIED_BY_DEFAULT)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tie", [True, False, None])
def test_what_is_stored_is_used(write, family, tie, stored, form, capsys):
    folder, tensors = write(family, tie, stored, form)
    tied = TIED_BY_DEFAULT[family] if tie is None else tie
    if not tied and stored in ("embedding", "head"):
        with pytest.raises(BarberError, match="is missing"):
            opened(folder)
        return
    checkpoint, model = opened(folder)
    said = capsys.readouterr().err
    embedding, head = (checkpoint.fetch(name) for name in (embedding_name(checkpoint.names()), head_name(model)))
    np.testing.assert_array_equal(embedding, tensors.get(embedding_name(tensors), tensors.get(HEAD)))
    np.testing.assert_array_equal(head, tensors.get(HEAD, embedding))
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert len(notes) == (tied and stored == "different")
    assert model.tied_embedding == (tied and stored != "different")


@pytest.mark.parametrize(
    ("family", "stored"),
    [*((family, stored) for family in ("llama", "opt") for stored in STORED[1:]), ("qwen3", "different")],
)
def test_transformers_uses_the_same_and_loads_what_is_exported(write, tmp_path, family, stored):
    folder, _ = write(family, True, stored)
    reference = loaded(folder)
    assert_same_logits(folder, reference)
    out = tmp_path / "out"
    for form in ("both", "orbax"):
        converter.run(["--ckpt", str(folder), "--out", str(out), "--format", form, "--overwrite"])
        assert_same_logits(out, reference)
        if form == "both":
            np.testing.assert_array_equal(logits(loaded(out), IDS[0]), logits(reference, IDS[0]))
            config = json.loads((out / "config.json").read_text())
            assert config["tie_word_embeddings"] == (stored != "different")


def loaded(folder):
    float32 = torch.float32
    options = {"output_loading_info": True, "dtype": float32}
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    return model.eval()


def test_the_head_of_a_base_models_save(write, tmp_path):
    folder, tensors = write(stored="head")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, folder / WEIGHTS)
    checkpoint, model = opened(folder)
    np.testing.assert_array_equal(checkpoint.fetch(head_name(model)), tensors[HEAD])


def test_a_head_that_does_not_fit_is_refused(write):
    folder, tensors = write()
    for head, said in [
        (tensors[HEAD][:-1], r"lm_head\.weight has shape \[96, 32\]"),
        (tensors[HEAD] > 0, "dtype BOOL"),
    ]:
        save_file(tensors | {HEAD: head}, folder / WEIGHTS)
        with pytest.raises(BarberError, match=said):
            opened(folder)


@pytest.mark.parametrize(
    ("stored", "other"), [("embedding", r"model\.embed_tokens\.weight"), ("head", r"lm_head\.weight")]
)
def test_the_way_out_where_one_side_is_missing(write, stored, other):
    folder, _ = write(tie=False, stored=stored)
    with pytest.raises(BarberError, match=f"if {other} is both, set tie_word_embeddings to true"):
        opened(folder)


def test_evaluation_resident_and_streaming(write, tmp_path):
    folder, _ = write()
    untied, _ = write(tie=False)
    np.save(tmp_path / "ids.npy", IDS.reshape(-1))
    ids, windows = tmp_path / "ids.npy", IDS.reshape(-1, 40)
    settings = {"length": 40, "tokens": (ids,)}
    (given,), (wanted,) = (evaluate(PerplexityConfig(str(each), **settings)) for each in (folder, untied))
    assert given["perplexity"] == wanted["perplexity"]
    rows, positions = (index.reshape(-1) for index in np.indices((3, 39)))
    resident = ResidentModel(*opened(folder), Devices())
    scores, _ = resident.log_likelihoods(windows, rows, positions, windows[:, 1:].reshape(-1))
    assert np.exp(-scores.mean()) == pytest.approx(wanted["perplexity"], rel=1e-5)


@pytest.mark.parametrize("stored", STORED)
def test_gguf(tmp_path, stored, capsys):
    tensors = gguf.hf_tensors(tied=False)
    embedding = embedding_name(tensors)
    if stored == "equal":
        tensors[HEAD] = tensors[embedding]
    if stored in ("embedding", "head"):
        del tensors[HEAD if stored == "embedding" else embedding]
    path = gguf.write(tmp_path / "m.gguf", gguf.gguf_tensors(tensors))
    if stored == "head":
        with pytest.raises(BarberError, match=r"token_embd\.weight is missing"):
            opened(path)
        return
    checkpoint, model = opened(path)
    np.testing.assert_array_equal(checkpoint.fetch(head_name(model)), tensors.get(HEAD, tensors[embedding]))
    assert model.tied_embedding == (stored == "embedding") and not capsys.readouterr().err
