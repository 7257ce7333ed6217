"""A command whose output folder another one is writing says so, before it touches anything."""

import importlib
import os
import shutil

import pytest
from cli import prune_masks

import barber_jax
from barber_jax.console.errors import BarberError
from barber_jax.console.locks import output_lock
from barber_jax.masks.mask_file import read_masks

COMMANDS = {
    "prune": ["--ckpt", "gone", "--calibration", "gone.npy", "--out", "out"],
    "prune again": ["--ckpt", "gone", "--calibration", "gone.npy", "--out", "out/", "--overwrite"],
    "prune on": ["--ckpt", "gone", "--calibration", "gone.npy", "--out", "../here/out", "--resume"],
    "recover": ["--ckpt", "gone", "--text", "gone.npy", "--out", "link/", "--overwrite"],
    "recover on": ["--ckpt", "gone", "--text", "gone.npy", "--out", "out", "--resume"],
    "convert.__main__": ["--ckpt", "gone", "--out", "link", "--overwrite"],
    "convert.apply_masks": ["--model", "gone", "--masks", "gone.safetensors", "--out", "out"],
    "report": ["out"],
    "eval.study": ["gone", "--out", "out"],
    "eval.study of a grid": ["--grid", "gone.yaml", "--ckpt", "gone", "--out", "out"],
    "eval.demo": ["out"],
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A result, and what an unfinished run has written beside it."""
    here = tmp_path / "here"
    for name, file in (("out", "run.json"), ("out.partial", "config.json"), ("out.run", "identity.json")):
        (here / name).mkdir(parents=True)
        (here / name / file).write_text("{}")
    (here / "link").symlink_to("out")
    monkeypatch.chdir(here)
    return here


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_a_folder(name, there):
    run = importlib.import_module(f"barber_jax.{name.partition(' ')[0]}").run
    with output_lock(there / "out"):
        before = snapshot(there)
        with pytest.raises(BarberError, match=f"{there}/out is being written by process {os.getpid()} on "):
            run(COMMANDS[name])
        assert snapshot(there) == before


def test_saving_a_module_takes_the_lock_too(there):
    class Module:
        source = "gone"

    with output_lock(there / "out"), pytest.raises(BarberError, match="out is being written by process"):
        barber_jax.save(Module(), None, there / "link", overwrite=True)


def test_training_takes_the_lock_too(tmp_path):
    from barber_jax.eval import train_opt

    with output_lock(tmp_path / "new"), pytest.raises(BarberError, match="new is being written by process"):
        train_opt.run(["--out", str(tmp_path / "new"), "--text", str(tmp_path / "gone.txt")])


def test_a_run_that_loses_its_folder_publishes_nothing(tiny, tiny_ids, tmp_path, monkeypatch):
    """As when somebody deletes the folder and the lock file, and starts another run."""
    from barber_jax import prune

    check = prune.HFFolder

    def replaced(folder):
        if folder.name == "out.partial":
            shutil.copytree(folder, tmp_path / "copy")
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "copy", folder)
        return check(folder)

    monkeypatch.setattr(prune, "HFFolder", replaced)
    options = ["--samples", 2, "--length", 16, "--method", "magnitude", "--no-rebuild"]
    with pytest.raises(BarberError, match=r"out\.partial was removed or replaced"):
        prune_masks(tmp_path / "out", tiny(), tiny_ids, *options)
    assert sorted(os.listdir(tmp_path)) == ["copy", "out.partial", "out.run"]
    # The blocks are kept.
    monkeypatch.undo()
    masks = prune_masks(tmp_path / "out", tiny(), tiny_ids, *options, "--resume")
    assert sorted(os.listdir(tmp_path)) == ["copy", "out"]
    copied = read_masks(tmp_path / "copy" / "masks.safetensors")
    assert masks and all((copied.read(name) == mask).all() for name, mask in masks.items())
