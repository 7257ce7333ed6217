"""What nobody expected: an exception at any stage is one line and status 1, with a log, and publishes nothing."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import write_model
from cli import command
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from barber_jax import prune, report
from barber_jax.console import causes
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.convert import __main__ as converter
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import FolderWriter
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.eval import perplexity, study
from barber_jax.run.history import History
from barber_jax.run.loop import Pruning

QUICK = ["--samples", 2, "--length", 8, "--method", "magnitude", "--no-rebuild"]
"""The way through the program that compiles least."""


class Panic(BaseException):
    """Not an Exception, as a panic of a library in Rust."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder of a tiny model with a tokenizer, token ids, a text, and the pruned model."""
    folder = tmp_path_factory.mktemp("sound")
    write_model(folder / "model")
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(96)} | {"[UNK]": 96}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 97, (8, 16)))
    (folder / "a.txt").write_text("w1 w2 w3 " * 100)
    prune.run(pruning(folder, folder / "pruned"))
    return folder


def pruning(folder, out, *options):
    given = ["--ckpt", folder / "model", "--out", out, "--calibration", folder / "ids.npy", *QUICK, *options]
    return [str(each) for each in given]


@pytest.fixture
def ends(tmp_path, capsys, monkeypatch):
    """Runs a command in which something raises; returns the lines before the error."""
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(causes.tempfile, "tempdir", str(logs))

    def run(main, given, kind=RuntimeError):
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda: main([str(each) for each in given]))
        assert stop.value.code == 1
        printed = capsys.readouterr()
        *earlier, line = printed.err.splitlines()
        (log,) = logs.glob("*.log")
        assert line.startswith(f"error: unexpected {kind.__name__}: boom; ") and line.endswith(f" in {log}")
        written = log.read_text()
        assert "Traceback (most recent call last)" in written and f"{kind.__name__}: boom" in written
        assert "Traceback" not in printed.err and not printed.out
        return earlier

    return run


STAGES = [
    *((prune, name, []) for name in ("claimed", "open_checkpoint", "build_model", "parse_mesh")),
    *((prune, name, []) for name in ("check_inputs", "open_start", "check_source", "evaluation_windows")),
    *((prune, name, []) for name in ("run_identity", "require_agreement", "open_state", "headline")),
    (FolderWriter, "__init__", []),
    *((prune, name, ["1 of"]) for name in ("measure_perplexity", "Pruning")),
    (Pruning, "_record", ["1 of"]),
    (History, "commit", ["1 of"]),
    (FolderWriter, "write_pruned", ["1 of", "1 of 2 blocks are kept in"]),
    *((FolderWriter, name, ["1 of", "2 of 2 blocks are kept in"]) for name in ("finish", "publish")),
    *(
        (prune, name, ["1 of", "2 of 2 blocks are kept in"])
        for name in ("run_record", "write_model_card", "apply_format")
    ),
]
"""Place and name of what raises; what the lines before the error's hold."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
@pytest.mark.parametrize(("place", "name", "says"), STAGES, ids=[name for _, name, _ in STAGES])
def test_a_pruning_run(ends, sound, tmp_path, monkeypatch, place, name, says, kind):
    def boom(*_, **__):
        raise kind("boom")

    monkeypatch.setattr(place, name, boom)
    earlier = ends(prune.run, pruning(sound, tmp_path / "out"), kind)
    assert len(earlier) == len(says), earlier
    assert all(part in line for part, line in zip(says, earlier, strict=True)), earlier
    left = {path.name for path in tmp_path.iterdir()} - {"logs"}
    assert left == ({"out.run"} if len(says) > 1 else set())


def test_a_report_that_cannot_be_drawn_costs_no_run(sound, tmp_path, monkeypatch, capsys):
    def boom(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(prune, "write_report", boom)
    exit_with_one_line(lambda: prune.run(pruning(sound, tmp_path / "out")))
    assert "report.html could not be written (boom)" in capsys.readouterr().err
    assert HFFolder(tmp_path / "out").names()


@pytest.mark.parametrize(
    ("main", "place", "name", "arguments"),
    [
        (converter.run, converter, "check_tensors", ["--ckpt", "model", "--out", "OUT"]),
        (converter.run, converter, "apply_format", ["--ckpt", "pruned", "--out", "OUT", "--format", "both"]),
        (report.run, report, "write_report", ["pruned"]),
        (study.run, study, "page_parts", ["pruned", "--out", "OUT"]),
        (perplexity.run, perplexity, "perplexity", ["--ckpt", "model", "--tokens", "ids.npy", "--length", 8]),
    ],
)
def test_the_other_commands(ends, sound, tmp_path, monkeypatch, main, place, name, arguments):
    def boom(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr(place, name, boom)
    monkeypatch.chdir(sound)
    ends(main, [tmp_path / "out" if each == "OUT" else each for each in arguments])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def refused(capfd, main, given):
    """The one line of a command that must refuse."""
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: main([str(each) for each in given]))
    assert stop.value.code == 2
    # capfd sees native code too: a panic prints lines of its own.
    printed = capfd.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and not printed.out
    return line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibration", "gone.npy"], "gone.npy: no such file"),
        (["--calibration", "gone.txt"], "gone.txt: neither a dataset"),
        (["--samples", "1" * 31], "--samples 1111111111111111111111111111111 is out of range"),
        (["--seed", "9" * 31], "is out of range"),
        (["--out", "o\udce9"], "is not UTF-8"),
        (["--out", "~nosuchuser/out"], "no home folder is known for ~nosuchuser"),
        (["--ckpt", "~nosuchuser/model"], "no home folder is known for ~nosuchuser"),
        (["--compilation-cache", "~nosuchuser/x"], "--compilation-cache ~nosuchuser/x: cannot be written"),
        (["--coordinator", "h:99999", "--processes", 1, "--process", 0], "a port is a number from 1 to 65535"),
    ],
)
def test_what_a_run_does_not_use_is_looked_at(sound, tmp_path, monkeypatch, capfd, options, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capfd, prune.run, [*pruning(sound, tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())


def test_a_platform_that_is_not_there(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    done = command("prune", *pruning(sound, tmp_path / "out"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: JAX_PLATFORMS=abacus: ") and not done.stdout


PANICS = {
    "load": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "use": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}
"""Entries of tokenizer.json on which the tokenizers library panics: while it is loaded, and at the first text."""


@pytest.mark.parametrize(("when", "says"), [("load", "no usable tokenizer there ("), ("use", "tokenizer fails on the")])
def test_a_panic_of_the_tokenizer(sound, tmp_path, capfd, when, says):
    model = shutil.copytree(sound / "model", tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content | PANICS[when]))
    for main, given in (
        (prune.run, [*pruning(sound, tmp_path / "out"), "--ckpt", model, "--eval-text", sound / "a.txt"]),
        (perplexity.run, ["--ckpt", model, "--text", sound / "a.txt", "--length", 8]),
    ):
        line = refused(capfd, main, given)
        assert str(model) in line and says in line and "(.npy)" in line
    assert not (tmp_path / "out").exists()


def test_code_of_a_tokenizer_is_never_run(sound, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    model = shutil.copytree(sound / "model", tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyTokenizer: pass\n")
    line = refused(capfd, perplexity.run, ["--ckpt", model, "--text", sound / "a.txt", "--length", 8])
    assert "which is never run; put a tokenizer.json there and remove auto_map, or give token ids (.npy)" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 70 + "1" + "}" * 70, "9" * 5000])
def test_a_tokenizer_beyond_all_bounds(sound, tmp_path, content):
    model = shutil.copytree(sound / "model", tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(BarberError, match="no usable tokenizer there"):
        open_checkpoint(str(model)).tokenizer()


def test_numbers_of_many_digits(sound, tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1", "n": ' + "9" * 5000 + "}\n")
    line = refused(capfd, perplexity.run, ["--ckpt", sound / "model", "--text", path, "--length", 8])
    assert "a.jsonl: line 1 is not JSON (an integer of more digits than are read)" in line
    model = shutil.copytree(sound / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    sizes = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    for key in (*sizes, "intermediate_size", "head_dim", "max_position_embeddings", "rms_norm_eps"):
        (model / "config.json").write_text(json.dumps(config | {key: 10**400}))
        line = refused(capfd, perplexity.run, ["--ckpt", model, "--tokens", sound / "ids.npy", "--length", 8])
        assert f"config.json: {key} must be a" in line and len(line) < 400
