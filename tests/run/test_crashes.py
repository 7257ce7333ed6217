"""A run that is killed, interrupted, disturbed by its clock or compile cache, or started twice, is not lost or changed.

`BARBER_JAX_CRASHES` is the number of random moments that each kind of run is cut off at, from `BARBER_JAX_CRASH_SEED`
on.
"""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import BASE, write_model
from test_resume import figures

from barber_jax import prune
from barber_jax.convert.orbax_folder import ORBAX

CRASHES = int(os.environ.get("BARBER_JAX_CRASHES", "1"))
FIRST = int(os.environ.get("BARBER_JAX_CRASH_SEED", "0"))
SEEDS = range(FIRST, FIRST + CRASHES)
OPTIONS = ["--samples", "4", "--length", "16", "--alpha", "0.5"]
RUNS = {
    "trained": ["--refine", "3", "--reconstruct", "4", "--reconstruct-rate", "0.1", "--reconstruct-scope", "all"],
    "by owl": ["--allocate", "owl", "--owl-m", "2"],
    "retained": ["--method", "sparsegpt", "--retain-reconstruction"],
    "both formats": ["--pattern", "2:4", "--format", "both"],
}
pytestmark = pytest.mark.slow


class Runs:
    """Runs of one model in processes of their own, and what each kind of them gives when nothing disturbs it."""

    def __init__(self, folder):
        self.folder, self.whole, self.seconds = folder, {}, {}
        write_model(folder / "dense", num_hidden_layers=4)
        np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))

    def line(self, kind, out, *more):
        given = ["--ckpt", self.folder / "dense", "--calibration", self.folder / "ids.npy", "--out", out, *OPTIONS]
        return [str(word) for word in [*given, *RUNS[kind], *more]]

    def start(self, kind, out, *more, **environment):
        program = [sys.executable, "-m", "barber_jax.prune", *self.line(kind, out, *more)]
        return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ | environment)

    def reference(self, kind):
        """What a whole run of this kind wrote."""
        if kind not in self.whole:
            out = self.folder / "".join(filter(str.isalpha, kind))
            end(self.start(kind, out.with_name("first")))  # fills the compile cache
            before = time.monotonic()
            process = self.start(kind, out)
            while not lock(out).exists() and process.poll() is None:
                time.sleep(0.002)
            self.starting = time.monotonic() - before
            end(process)
            self.seconds[kind] = time.monotonic() - before - self.starting
            self.whole[kind] = written(out)
            assert written(out.with_name("first")) == self.whole[kind]
            shutil.rmtree(out.with_name("first"))
        return self.whole[kind]

    def cut_off(self, kind, out, number, rng):
        """Start a run and send it a signal at a random moment since it took its lock; its status and stderr."""
        wait = rng.uniform(0, self.seconds[kind])
        process = self.start(kind, out)
        while not lock(out).exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        return process.returncode, said

    def finish(self, kind, out):
        """Do what a user does after a crash."""
        if not out.exists():
            unfinished = (out.with_name(f"{out.name}.run") / "identity.json").exists()
            end(self.start(kind, out, *(["--resume"] if unfinished else [])))
        assert written(out) == self.reference(kind)


def written(out):
    """All of a result that does not depend on the time or the place; of its Orbax folder only the arrays."""
    arrays = {}
    if (out / ORBAX).exists():
        leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().restore(out / ORBAX))
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
        assert arrays
    return figures(out), arrays


def lock(out):
    return out.with_name(f".{out.name}.lock")


def end(process):
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module", autouse=True)
def heeded_signals():
    """Processes started from here heed these signals, also where pytest runs in a shell's background."""
    ignored = [each for each in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(each) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("crashes"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_a_random_moment(kind, seed, runs, tmp_path):
    runs.reference(kind)
    out = tmp_path / "out"
    status, said = runs.cut_off(kind, out, signal.SIGKILL, random.Random(f"{kind} {seed}"))
    assert status in (0, -signal.SIGKILL), said
    if out.exists():
        assert written(out) == runs.reference(kind)
    runs.finish(kind, out)
    # Killed when the result had its name already, the run's blocks and the lock file may be left; nothing else ever is.
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.run", ".out.lock"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("kind", RUNS)
def test_ended_by_a_signal_at_a_random_moment(kind, number, status, seed, runs, tmp_path):
    runs.reference(kind)
    out = tmp_path / "out"
    ended, said = runs.cut_off(kind, out, number, random.Random(f"{kind} {number} {seed}"))
    left = {path.name for path in tmp_path.iterdir()}
    assert "Traceback" not in said, said
    if out.exists():
        # The signal came after the last block's work, or too late.
        assert ended in (0, status) and left == {"out"}, said
    else:
        assert ended == status and said.splitlines()[-1].startswith("error: interrupted by SIG"), said
        assert left <= {"out.run"}
        assert ("--resume continues from there" in said) == (left == {"out.run"}), said
    runs.finish(kind, out)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--resume"]], ids=" ".join)
def test_a_second_run_started_at_a_random_moment(again, seed, runs, tmp_path):
    kind, out = "both formats", tmp_path / "out"
    whole = runs.reference(kind)
    first = runs.start(kind, out)
    time.sleep(random.Random(f"{again} {seed}").uniform(0, runs.seconds[kind] + runs.starting / 2))
    second = runs.start(kind, out, *again)
    told = [process.communicate(timeout=300)[1] for process in (first, second)]
    ended = [first.returncode, second.returncode]
    if ended == [0, 0]:
        # It started when the first one had ended, and wrote all anew.
        assert again == ["--overwrite"], told
        whole = copy.deepcopy(whole)
        whole[0][0]["options"]["overwrite"] = True
    else:
        refused = told[ended.index(2)]
        assert sorted(ended) == [0, 2], told
        reasons = ("is being written by process", "exists", "no unfinished run")
        assert any(reason in refused for reason in reasons) and "Traceback" not in refused, refused
    assert written(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_clock_that_goes_backwards(runs, tmp_path, monkeypatch):
    kind, out = "trained", tmp_path / "out"
    whole = runs.reference(kind)
    clock = [time.time()]

    def earlier():
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))
    prune.run(runs.line(kind, out))
    monkeypatch.undo()
    assert written(out) == whole
    record = json.loads((out / "run.json").read_text())
    durations = [record["totals"]["seconds"], *record["totals"]["seconds_per_stage"].values()]
    assert all(0 <= seconds < 3600 for seconds in durations)


def emptied(content, rng):
    return b""


def truncated(content, rng):
    return content[: rng.randrange(1, len(content))]


def changed(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def replaced(content, rng):
    return rng.randbytes(len(content))


@pytest.fixture(scope="module")
def cache(runs, tmp_path_factory):
    """A compile cache that one run has filled. JAX does not find its entries in a copy of the folder."""
    folder = tmp_path_factory.mktemp("cache")
    end(runs.start("retained", folder / "out", JAX_COMPILATION_CACHE_DIR=str(folder / "compiled")))
    return folder / "compiled"


@pytest.mark.parametrize("damage", [emptied, truncated, changed, replaced])
def test_a_damaged_compile_cache(damage, runs, cache, tmp_path):
    whole = runs.reference("retained")
    rng = random.Random(FIRST)
    damaged = {path: damage(path.read_bytes(), rng) for path in sorted(cache.glob("*-cache"))}
    assert damaged
    for path, content in damaged.items():
        path.write_bytes(content)
    said = end(runs.start("retained", tmp_path / "out", JAX_COMPILATION_CACHE_DIR=str(cache)))
    assert "warning" not in said and "Traceback" not in said
    assert written(tmp_path / "out") == whole
    # Compiled and stored again.
    assert all(path.read_bytes() != content for path, content in damaged.items())
