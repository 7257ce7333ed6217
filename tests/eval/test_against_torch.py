"""Recovery in barber_jax and in PyTorch: the same losses, step by step."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.eval import against_torch
from barber_jax.eval.against_torch_recover import Training, compare


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """The tiny model with the smaller half of every matrix at zero."""
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    shutil.copytree(tiny(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj." in name:
            tensors[name] = np.where(np.abs(tensor) < np.median(np.abs(tensor)), 0, tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "alone"])
def test_both_sides_have_the_same_losses(pruned, tiny, tiny_ids, distilled):
    pytest.importorskip("torch")
    # A high rate, which shows a difference between the optimizers at once; and two micro-batches a step.
    teacher = str(tiny()) if distilled else None
    training = Training(pruned, teacher, str(tiny_ids), length=16, batch=4, micro_batch=2, steps=6, rate=0.05)
    figures = compare(training)
    ours, theirs = (np.array(figures["programs"][name]["losses"]) for name in ("barber_jax", "transformers"))
    assert len(ours) == len(theirs) == 6
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert figures["largest_difference"] == np.abs(ours - theirs).max()
    # Training changes the losses by a hundred times as much.
    untrained = compare(dataclasses.replace(training, rate=1e-9))["programs"]["barber_jax"]["losses"]
    assert np.abs(ours - untrained).max() > 1e-2


def test_the_command_prints_and_writes_both(pruned, tiny, tiny_ids, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "figures.json"
    line = ["--recover", "--ckpt", pruned, "--teacher", tiny(), "--tokens", tiny_ids, "--length", 16, "--steps", 3]
    against_torch.run([str(argument) for argument in [*line, "--json", out]])
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    for name in ("barber_jax", "transformers"):
        program = content["programs"][name]
        assert name in printed and len(program["losses"]) == len(program["seconds"]) == 3
        assert program["tokens_per_second"] == pytest.approx(4 * 16 / np.mean(program["seconds"][1:]))
    assert "largest difference" in printed
    assert content["options"]["teacher"] == str(tiny())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "30"], "--steps 30 needs --recover"),
        (["--recover", "--repeat", "4"], "--repeat 4 is not used with --recover"),
        (["--recover", "--steps", "1"], "--steps 1 must be at least 2"),
    ],
    ids=["steps", "repeat", "one step"],
)
def test_options_of_the_other_comparison_are_refused(options, message, tiny_ids):
    with pytest.raises(BarberError, match=message):
        against_torch.run(["--ckpt", "model", "--tokens", str(tiny_ids), *options])
