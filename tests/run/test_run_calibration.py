"""Pruning with samples that the dense model writes: as a file, mixed with text, and after an interruption."""

import json
import shutil

import numpy as np
import pytest
from cli import interrupted_after, masks_of

from barber_jax import BarberError, prune
from barber_jax.run import calibration

OPTIONS = ["--samples", "4", "--length", "16", "--alpha", "0.5"]


def run(ckpt, out, source, *options):
    words = ["--ckpt", ckpt, "--out", out, "--calibration", source, *OPTIONS, *options]
    prune.run([str(word) for word in words])
    return masks_of(out)


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def record(out):
    return json.loads((out / "run.json").read_text())


def refuse_to_write(*arguments, **options):
    raise AssertionError("written again")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("self") / "whole"
    run(tiny(), folder, "self")
    return folder


def test_the_samples_are_kept_as_a_file_that_can_be_used_again(tiny, whole, tmp_path):
    ids = np.load(whole / "calibration.npy")
    assert ids.dtype == np.int32 and ids.shape == (4, 16)
    assert (ids[:, 0] == 1).all() and len(np.unique(ids, axis=0)) == 4
    entry = record(whole)["written_calibration"]
    assert entry.pop("seconds") > 0
    assert entry == {"samples": 4, "begins_with": "begin", "token": 1}
    assert "4 calibration samples of 16 tokens, written by the dense model itself." in (whole / "README.md").read_text()
    again = run(tiny(), tmp_path / "again", whole / "calibration.npy")
    assert equal(again, masks_of(whole))
    assert not (tmp_path / "again" / "calibration.npy").exists()
    assert "written_calibration" not in record(tmp_path / "again")


def test_an_interrupted_run_goes_on_with_its_own_samples(tiny, whole, tmp_path, monkeypatch, capsys):
    # Whatever the seed would give now: a run that has none of its own draws other samples.
    ids = np.load(whole / "calibration.npy")[::-1].copy()
    monkeypatch.setattr(calibration, "write_samples", lambda *arguments, **options: ids)
    with interrupted_after(1):
        run(tiny(), tmp_path / "out", "self")
    assert "the calibration samples and 1 of 2 blocks are kept" in capsys.readouterr().err
    shutil.copytree(tmp_path / "out.run", tmp_path / "kept")
    monkeypatch.setattr(calibration, "write_samples", refuse_to_write)
    for options, said in (
        (["--seed", "1"], "--resume: --seed was 0 in the run"),
        ([], "holds an unfinished run; --resume continues it"),
    ):
        with pytest.raises(BarberError, match=said):
            run(tiny(), tmp_path / "out", "self", *options, *(["--resume"] if options else []))
    run(tiny(), tmp_path / "out", "self", "--resume")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "calibration.npy"), ids)
    assert record(tmp_path / "out")["written_calibration"]["seconds"] > 0
    assert not (tmp_path / "out.run").exists()


def test_samples_outlive_an_interruption_in_the_first_block(tiny, whole, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prune, "write_blocks", interrupt)
        run(tiny(), tmp_path / "out", "self")
    monkeypatch.setattr(calibration, "write_samples", refuse_to_write)
    with pytest.raises(BarberError, match="holds an unfinished run; --resume continues it"):
        run(tiny(), tmp_path / "out", "self")
    assert equal(run(tiny(), tmp_path / "out", "self", "--resume"), masks_of(whole))


@pytest.mark.parametrize("left", ["nothing", "another's", "damaged"])
def test_nothing_to_resume(left, tiny, tiny_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "write_samples", refuse_to_write)
    if left == "another's":
        with interrupted_after(1):
            run(tiny(), tmp_path / "out", tiny_ids)
    if left == "damaged":
        (tmp_path / "out.run" / "calibration").mkdir(parents=True)
        (tmp_path / "out.run" / "identity.json").write_text("{}")
        (tmp_path / "out.run" / "calibration" / "block.safetensors").write_bytes(b"no tensors")
    said = "no unfinished run under" if left == "nothing" else "holds no calibration samples that the model has written"
    with pytest.raises(BarberError, match=f"--resume: .*{said}"):
        run(tiny(), tmp_path / "out", "self", "--resume")


def test_half_of_text(tiny, tiny_ids, whole, tmp_path):
    run(tiny(), tmp_path / "out", f"self+{tiny_ids}", "--no-rebuild")
    ids = np.load(tmp_path / "out" / "calibration.npy")
    np.testing.assert_array_equal(ids[::2], np.load(whole / "calibration.npy")[:2])
    np.testing.assert_array_equal(ids[1::2], np.load(tiny_ids)[:2])
    assert record(tmp_path / "out")["written_calibration"]["samples"] == 2
    assert "half of them written by the dense model itself" in (tmp_path / "out" / "README.md").read_text()


def test_samples_that_nothing_uses_are_not_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "write_samples", refuse_to_write)
    run(tiny(), tmp_path / "out", "self", "--method", "magnitude", "--no-rebuild")
    assert not (tmp_path / "out" / "calibration.npy").exists()
    assert "written_calibration" not in record(tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("self+", [], r"--calibration self\+: no text after the \+"),
        ("self+c4", ["--samples", "1"], r"--calibration self\+c4: half of --samples 1 is none"),
        ("self+nowhere.txt", [], "nowhere.txt: neither a dataset"),
        ("self", ["--length", "65"], "--length 65 is more than the model's 64 positions"),
        ("self", ["--samples", "1000000000"], "1000000000 samples of 16 tokens: .*; lower --samples"),
    ],
    ids=["no text", "half of one", "no file", "length", "samples"],
)
def test_what_cannot_be_written(source, options, said, tiny, tmp_path):
    with pytest.raises(BarberError, match=said):
        run(tiny(), tmp_path / "out", source, *options)
    assert not list(tmp_path.iterdir())
