"""A run that was cut off is resumed, and ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BASE, write_model
from cli import interrupted_after, prune_masks

from barber_jax import prune
from barber_jax.console.errors import BarberError
from barber_jax.convert.export import FolderWriter

OPTIONS = ["--samples", "4", "--length", "16", "--alpha", "0.5"]
METHODS = {
    "wanda": [],
    "magnitude": ["--method", "magnitude", "--save-start"],
    "sparsegpt": ["--method", "sparsegpt"],
    "retained": ["--method", "sparsegpt", "--retain-reconstruction"],
    "not rebuilt": ["--method", "sparsegpt", "--no-rebuild"],
    "by owl": ["--allocate", "owl", "--owl-m", "2"],
    "offloaded": ["--batch", "2", "--offload-activations"],
    "chosen": ["--method", "magnitude", "--alpha", "auto", "--target", "same"],
    "trained": [
        *("--refine", "3", "--reconstruct", "4", "--reconstruct-rate", "0.1", "--rounds", "2"),
        *("--reconstruct-scope", "all", "--token-weighting", "norm"),
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "dense", num_hidden_layers=5)
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    return folder


def line(inputs, out, *options):
    given = ["--ckpt", inputs / "dense", "--calibration", inputs / "ids.npy", "--out", out, *OPTIONS, *options]
    return [str(word) for word in given]


def figures(out: Path):
    """Everything in run.json that is not a time or a size of memory, and the bytes of every file right below `out`."""
    record = json.loads((out / "run.json").read_text())
    for block in record["blocks"]:
        del block["seconds"]
    for timed in ("seconds", "seconds_per_stage"):
        del record["totals"][timed]
    del record["peak_memory"]
    for told in ("out", "resume"):
        del record["options"][told]
    # The report shows what run.json holds, times too.
    told = ("run.json", "report.html", "README.md")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name not in told}
    card = (out / "README.md").read_text()
    for place in ("# {}\n", '"{}"', '"{}/', "--out {}\n"):
        assert place.format(out.name) in card
        card = card.replace(place.format(out.name), place)
    files["README.md"] = card
    return record, files


# The base tests of criteria and stages resume each of them; here is what concerns several.
QUICK = ("magnitude", "by owl", "offloaded", "trained")


@pytest.mark.parametrize(
    "method", [method if method in QUICK else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
)
def test_resumed_is_identical(method, inputs, tmp_path, capsys):
    options = METHODS[method]
    prune.run(line(inputs, tmp_path / "whole", *options))
    with interrupted_after(3):
        prune.run(line(inputs, tmp_path / "out", *options))
    said = capsys.readouterr().err
    assert "3 of 5 blocks are kept" in said and "--resume continues from there" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.run", "whole"]
    prune.run(line(inputs, tmp_path / "out", *options, "--resume"))
    assert "resuming after 3 of 5 blocks" in capsys.readouterr().err
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_same_seed_same_bytes(inputs, tmp_path):
    for name in ("one", "two"):
        said = subprocess.run(
            [sys.executable, "-m", "barber_jax.prune", *line(inputs, tmp_path / name)], capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


@pytest.mark.parametrize("moment", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 10))])
def test_killed_at_any_moment(moment, inputs, tmp_path):
    """kill -9 when the n-th file below the output's folder appears or a random while after: any stage, any write."""
    reference = inputs / "reference"
    if not reference.exists():
        prune.run(line(inputs, reference))
    rng = random.Random(moment)
    out = tmp_path / "out"
    after, wait = rng.randint(0, 5), rng.uniform(0, 0.4)
    program = [sys.executable, "-m", "barber_jax.prune", *line(inputs, out)]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    state = tmp_path / "out.run"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        committed = len([p for p in state.iterdir() if p.name.isdigit()]) if state.is_dir() else -1
        if committed >= after:
            time.sleep(wait)
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    if process.returncode == -signal.SIGKILL and not out.exists():
        resume = ["--resume"] if (state / "identity.json").exists() else []
        done = subprocess.run([*program, *resume], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert figures(out) == figures(reference)
    # Killed when the result had its name already, the run's blocks and the lock file may be left; nothing else ever is.
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.run", ".out.lock"}


@pytest.mark.parametrize(
    ("number", "status", "last"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "error: interrupted by SIGTERM")],
)
def test_interrupted_by_a_signal(number, status, last, inputs, tmp_path):
    program = [sys.executable, "-m", "barber_jax.prune", *line(inputs, tmp_path / "out")]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.run" / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == status
    assert said.splitlines()[-1] == last and "--resume continues from there" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


@pytest.fixture
def unfinished(inputs, tmp_path):
    with interrupted_after(3):
        prune.run(line(inputs, tmp_path / "out"))
    return tmp_path / "out"


def test_damaged_last_block_is_computed_again(inputs, unfinished, capsys):
    for file in sorted((unfinished.with_name("out.run") / "2").rglob("*")):
        if file.is_file() and file.stat().st_size > 500:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    defaults = ["--sparsity", "0.5", "--pattern", "unstructured", "--method", "wanda"]  # said only now
    prune.run(line(inputs, unfinished, *defaults, "--resume"))
    said = capsys.readouterr().err
    assert "block 2 is damaged" in said and "resuming after 2 of 5 blocks" in said
    prune.run(line(inputs, unfinished.with_name("whole")))
    assert figures(unfinished) == figures(unfinished.with_name("whole"))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (["--alpha", "0.4"], "--alpha was 0.5"),
        (["--granularity", "layer"], "--granularity was output1"),
        (["--sparsity", "0.6"], "--sparsity was 0.5"),
        (["--pattern", "2:4"], "--pattern was unstructured"),
        (["--samples", "2"], "--samples was 4"),
        (["--batch", "1"], "--batch was"),
        (["--compute-dtype", "bfloat16"], "--compute-dtype was float32"),
    ],
)
def test_another_option_is_refused(changed, complaint, inputs, unfinished):
    with pytest.raises(BarberError, match=complaint):
        prune.run([*line(inputs, unfinished), *changed, "--resume"])
    assert (unfinished.with_name("out.run") / "2").exists()


def test_another_order_of_training_samples_is_refused(inputs, tmp_path):
    """The seed, which is of no importance where ids are given and nothing is trained."""
    trained = ["--reconstruct", "2"]
    with interrupted_after(1):
        prune.run(line(inputs, tmp_path / "out", *trained))
    with pytest.raises(BarberError, match="--seed was 0"):
        prune.run(line(inputs, tmp_path / "out", *trained, "--seed", "1", "--resume"))


def test_another_checkpoint_or_calibration_is_refused(inputs, unfinished, tmp_path):
    np.save(tmp_path / "other.npy", np.random.default_rng(2).integers(0, BASE["vocab_size"], (4, 16)))
    with pytest.raises(BarberError, match="content of the calibration ids"):
        prune.run([*line(inputs, unfinished), "--calibration", str(tmp_path / "other.npy"), "--resume"])
    shutil.copytree(inputs / "dense", tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BarberError, match=r"content of --ckpt model\.safetensors"):
        prune.run([*line(inputs, unfinished), "--ckpt", str(tmp_path / "dense"), "--resume"])


def test_an_unfinished_run_is_not_lost_by_mistake(inputs, unfinished):
    with pytest.raises(BarberError, match="--resume continues it"):
        prune.run(line(inputs, unfinished))
    with pytest.raises(BarberError, match="no unfinished run"):
        prune.run(line(inputs, unfinished.with_name("elsewhere"), "--resume"))
    masks = prune_masks(unfinished, inputs / "dense", inputs / "ids.npy", *OPTIONS, "--overwrite")
    assert masks and not unfinished.with_name("out.run").exists()


def test_a_full_disk_keeps_the_blocks(inputs, tmp_path, monkeypatch):
    written = []
    write = FolderWriter.write_pruned

    def full(self, name, weight, mask):
        written.append(name)
        if len(written) > 10:
            raise BarberError(f"cannot write {self.folder}: No space left on device")
        write(self, name, weight, mask)

    with monkeypatch.context() as patch:
        patch.setattr(FolderWriter, "write_pruned", full)
        with pytest.raises(BarberError, match="No space left"):
            prune.run(line(inputs, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out.run"]
    prune.run(line(inputs, tmp_path / "out", "--resume"))
    prune.run(line(inputs, tmp_path / "whole"))
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")
