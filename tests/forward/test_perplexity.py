"""Perplexity over several texts and devices, against a plain loop over transformers' model."""

import json
import math

import numpy as np
import pytest
import torch
from checkpoints import write_model
from cli import command

from barber_jax.console.errors import BarberError
from barber_jax.eval.perplexity import PerplexityConfig, evaluate, read_results


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A tiny model, two files of ids, and what transformers makes of windows of 16."""
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder)
    rng = np.random.default_rng(5)
    files, wanted = [], []
    for name, count in (("a.npy", 7 * 16 + 5), ("b.npy", 16 * 16)):
        ids = rng.integers(0, 97, count)
        files.append(folder / name)
        np.save(files[-1], ids)
        losses = []
        for window in ids[: count // 16 * 16].reshape(-1, 16):
            tokens = torch.as_tensor(window[None])
            with torch.no_grad():
                losses.append(float(model(tokens, labels=tokens).loss))
        wanted.append(math.exp(np.mean(losses)))
    return folder, tuple(files), wanted


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("offload", [False, True])
def test_several_texts_in_one_call(case, batch, offload):
    folder, files, wanted = case
    config = PerplexityConfig(str(folder), length=16, tokens=files, batch=batch, offload_activations=offload)
    results = evaluate(config)
    assert [result["perplexity"] for result in results] == pytest.approx(wanted, rel=1e-5)
    assert [result["windows"] for result in results] == [7, 16]
    assert [result["source"] for result in results] == [str(file) for file in files]


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
    folder, files, wanted = case
    line = ["--ckpt", folder, "--tokens", files[1], "--length", 16, "--windows", 16, "--repeat", 1]
    done = command("eval.against_torch", *line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{wanted[1]:.5g}"[:5]) == 2
