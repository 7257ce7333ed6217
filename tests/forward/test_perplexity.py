"""Perplexity over several texts and devices, against a plain loop over transformers' model."""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import our_logits, write_model, write_reference
from cli import command

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.eval.perplexity import PerplexityConfig, evaluate, read_results
from barber_jax.forward import dense, passes, perplexity
from barber_jax.models import build_model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A tiny model, two files of ids, and their perplexity in windows of 16 from a plain loop over logits."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    rng = np.random.default_rng(5)
    files, wanted = [], []
    for name, count in (("a.npy", 7 * 16 + 5), ("b.npy", 16 * 16)):
        ids = rng.integers(0, 97, count)
        files.append(folder / name)
        np.save(files[-1], ids)
        windows = ids[: count // 16 * 16].reshape(-1, 16)
        wanted.append(plain_perplexity(our_logits(folder, ids=windows[None].astype(np.int32)), windows))
    return folder, tuple(files), wanted


def plain_perplexity(logits, windows):
    """exp of the mean over windows of the mean next-token loss, from float32 logits [windows, length, vocabulary]."""
    scores = logits[:, :-1].astype(np.float64)
    log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return math.exp(-np.mean(np.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1)))


def test_transformers_measures_the_same(case, tmp_path):
    _, files, wanted = case
    torch = pytest.importorskip("torch")
    model = write_reference(tmp_path)
    for file, value in zip(files, wanted, strict=True):
        ids = np.load(file)
        losses = []
        for window in ids[: len(ids) // 16 * 16].reshape(-1, 16):
            tokens = torch.as_tensor(window[None])
            with torch.no_grad():
                losses.append(float(model(tokens, labels=tokens).loss))
        assert math.exp(np.mean(losses)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("offload", [False, True])
def test_several_texts_in_one_call(case, batch, offload):
    folder, files, wanted = case
    config = PerplexityConfig(str(folder), length=16, tokens=files, batch=batch, offload_activations=offload)
    results = evaluate(config)
    assert [result["perplexity"] for result in results] == pytest.approx(wanted, rel=1e-5)
    assert [result["windows"] for result in results] == [7, 16]
    assert [result["source"] for result in results] == [str(file) for file in files]


def test_logits_of_a_large_vocabulary_are_held_for_few_tokens(case, monkeypatch):
    checkpoint = open_checkpoint(str(case[0]))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    parameters = dense.read_replicated(checkpoint, model.names.head, Devices())
    hidden, ids = np.ones((2, 3, 20, 32), np.float32), np.zeros((2, 3, 20), np.int32)
    # Of the function that is jitted: the limit is no argument, so a program from before would stay.
    losses = partial(perplexity.window_losses.__wrapped__, model.head())
    whole = losses(parameters, hidden, ids)
    monkeypatch.setattr(passes, "HEAD_LOGITS", 97 * 7)
    shapes = re.findall(r"f32\[([\d,]+),97\]", str(jax.make_jaxpr(losses)(parameters, hidden, ids)))
    # 4 tokens are no more than that; of 3 windows one at a time. And the head's kernel.
    assert {math.prod(map(int, shape.split(","))) for shape in shapes} == {3, 32}
    np.testing.assert_allclose(losses(parameters, hidden, ids), whole, rtol=1e-6)


def test_only_tokens_that_occur_are_copied_to_the_devices(case):
    checkpoint = open_checkpoint(str(case[0]))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    ids = np.array([[[5, 90, 5], [0, 7, 90]]], np.int32)
    parameters, own = dense.read_embedding(checkpoint, model, ids, Devices())
    table = checkpoint.read("model.embed_tokens.weight")
    assert parameters[dense.TOKENS].shape == (4, 32) and own.dtype == np.int32
    (hidden,) = dense.embedded(model, parameters, own, (), Devices())
    np.testing.assert_array_equal(hidden, table[ids])


def test_many_devices_measure_the_same(case, tmp_path):
    folder, files, wanted = case
    out = tmp_path / "perplexity.json"
    line = ["--ckpt", folder, "--length", 16, "--tokens", *files, "--mesh", "data=2,model=2", "--batch", 3]
    done = command("eval.perplexity", *line, "--json", out, devices=4)
    assert done.returncode == 0, done.stderr
    assert [result["perplexity"] for result in read_results(out)] == pytest.approx(wanted, rel=1e-5)
    assert len(done.stdout.splitlines()) == 2


def test_the_file_of_one_text_is_flat(case, tmp_path):
    folder, files, wanted = case
    out = tmp_path / "perplexity.json"
    done = command("eval.perplexity", "--ckpt", folder, "--length", 16, "--tokens", files[0], "--json", out)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["perplexity"] == pytest.approx(wanted[0], rel=1e-5)
    assert content["tokens"] == 7 * 15
    assert read_results(out) == [content]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"perplexity": "x", "source": "a"}', '{"results": 3}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "perplexity.json"
    path.write_text(content)
    with pytest.raises(BarberError, match="measure again"):
        read_results(path)


def test_against_torch_prints_both(case):
    pytest.importorskip("torch")
    folder, files, wanted = case
    line = ["--ckpt", folder, "--tokens", files[1], "--length", 16, "--windows", 16, "--repeat", 1]
    done = command("eval.against_torch", *line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{wanted[1]:.5g}"[:5]) == 2
