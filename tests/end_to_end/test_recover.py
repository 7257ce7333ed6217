"""Whole recoveries through the command line: what they write, and what is left of one that does not end well."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers
from checkpoints import assert_same_logits, torch, write_model
from cli import command, environment, masks_of, prune_masks, run_recovery
from safetensors.numpy import load_file

from barber_jax import recover
from barber_jax.console import causes
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.locks import output_lock
from barber_jax.convert.export import FolderWriter
from barber_jax.recovery import loop

RUN = ["--length", 16, "--batch", 4, "--micro-batch", 2, "--held-out", 4, "--steps", 6, "--eval-every", 2]
WEIGHTS, MASKS = "model.safetensors", "masks.safetensors"
CRASHES = int(os.environ.get("BARBER_JAX_CRASHES", "2"))


@pytest.fixture(scope="module")
def recovered(tiny, tiny_pruned, tiny_ids, tmp_path_factory):
    """Folder of a whole run, and its recover.json."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    return out, run_recovery(out, tiny_pruned, tiny_ids, "--teacher", tiny(), *RUN)


@pytest.fixture
def line(tiny, tiny_pruned, tiny_ids, tmp_path):
    """Arguments of the same run into another folder."""
    given = ["--ckpt", tiny_pruned, "--text", tiny_ids, "--out", tmp_path / "out", "--teacher", tiny(), *RUN]
    return [str(word) for word in given]


def assert_same(out, recovered):
    for name in (WEIGHTS, MASKS, "config.json"):
        assert (out / name).read_bytes() == (recovered[0] / name).read_bytes(), name
    record = json.loads((out / "recover.json").read_text())
    for kind in ("training", "evaluations"):
        ours, theirs = ([{**e, "seconds": 0} for e in r[kind]] for r in (record, recovered[1]))
        assert ours == theirs
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def assert_sparse(out, pruned):
    assert (out / MASKS).read_bytes() == (pruned / MASKS).read_bytes()
    weights, before = load_file(out / WEIGHTS), load_file(pruned / WEIGHTS)
    assert weights.keys() == before.keys()
    for name, mask in masks_of(pruned).items():
        np.testing.assert_array_equal(weights[name] != 0, mask, err_msg=name)
        assert weights[name].dtype == before[name].dtype
    return weights, before


def test_a_run_from_the_command_line(line, recovered, tiny_pruned, tmp_path):
    done = command("recover", *line)
    # Two lines, and nothing of any library.
    assert done.returncode == 0 and done.stdout == "", done.stderr
    first, last = done.stderr.splitlines()
    assert first.startswith("1 x cpu") and "6 steps of 4 x 16 tokens" in first
    assert "held-out loss" in last and "at step 6 (best)" in last
    assert_same(tmp_path / "out", recovered)


def test_what_is_written(recovered, tiny_pruned):
    out, record = recovered
    weights, before = assert_sparse(out, tiny_pruned)
    masks = masks_of(tiny_pruned)
    for name, value in weights.items():
        moved = value != before[name]
        assert moved[masks[name]].mean() > 0.9 if name in masks else not moved.any(), name
    assert [each["step"] for each in record["training"]] == [1, 2, 3, 4, 5, 6]
    losses = {each["step"]: each["loss"] for each in record["evaluations"]}
    assert list(losses) == [0, 2, 4, 6] and losses[6] == min(losses.values()) < losses[0]
    assert {"README.md", "report.html", "recover.json", "config.json"} <= {path.name for path in out.iterdir()}


def test_transformers_loads_it(recovered):
    assert torch.__name__
    model = transformers.LlamaForCausalLM.from_pretrained(recovered[0], dtype=torch.float32)
    assert_same_logits(recovered[0], model.eval())


@pytest.mark.parametrize(
    "options",
    [["--scope", "lora", "--rank", 4], pytest.param(["--scope", "all"], marks=pytest.mark.slow)],
    ids=["lora", "all"],
)
def test_other_scopes(options, tiny, tiny_pruned, tiny_ids, tmp_path):
    # Without a teacher: the loss is cross-entropy.
    record = run_recovery(tmp_path / "out", tiny_pruned, tiny_ids, *RUN, "--steps", 2, "--keep", "last", *options)
    weights, before = assert_sparse(tmp_path / "out", tiny_pruned)
    moved = {name for name, value in weights.items() if (value != before[name]).any()}
    assert moved == set(weights if options[1] == "all" else masks_of(tiny_pruned))
    assert all(each["kl"] is None for each in record["training"] + record["evaluations"])
    assert all(each["loss"] == each["cross_entropy"] for each in record["training"])


def test_the_best_weights_are_written_or_the_last(tiny, tiny_pruned, tiny_ids, tmp_path):
    """A rate at which it only gets worse: the best weights are those of the start."""
    given = [tiny_pruned, tiny_ids, "--teacher", tiny(), *RUN, "--steps", 2, "--rate", 0.9]
    best = run_recovery(tmp_path / "best", *given)
    assert (best["best_step"], best["written"]) == (0, "best")
    weights, before = assert_sparse(tmp_path / "best", tiny_pruned)
    assert all((weights[name] == before[name]).all() for name in weights)
    last = run_recovery(tmp_path / "last", *given, "--keep", "last")
    assert last["written"] == "last"
    weights, _ = assert_sparse(tmp_path / "last", tiny_pruned)
    assert any((weights[name] != before[name]).any() for name in weights)


def test_a_rate_that_diverges(tiny, tiny_pruned, tiny_ids, tmp_path):
    given = [tiny_pruned, tiny_ids, "--teacher", tiny(), *RUN, "--rate", 1e37, "--warm-up", 0]
    with pytest.raises(BarberError) as error:
        run_recovery(tmp_path / "out", *given)
    assert "--rate 1e+37: loss or gradient of step 2 is not finite" in str(error.value)
    assert "the weights of step 0, the best before it; lower --rate" in str(error.value)
    weights, before = assert_sparse(tmp_path / "out", tiny_pruned)
    assert all((weights[name] == before[name]).all() for name in weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_float16_that_overflows(tiny_ids, tmp_path):
    write_model(tmp_path / "dense", dtype="float16")
    options = ["--samples", 4, "--length", 16, "--no-rebuild", "--method", "magnitude"]
    prune_masks(tmp_path / "pruned", tmp_path / "dense", tiny_ids, *options)
    given = [tmp_path / "pruned", tiny_ids, *RUN, "--steps", 1, "--rate", 1e7]
    with pytest.raises(BarberError, match="do not fit float16"):
        run_recovery(tmp_path / "out", *given, "--keep", "last")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}
    record = run_recovery(tmp_path / "out", *given)
    assert record["best_step"] == 0


CUT_OFF = """
import os, signal, sys
from barber_jax import recover
from barber_jax.console.errors import exit_with_one_line
from barber_jax.recovery import loop
step, at, how = loop.train_step, int(sys.argv.pop(1)), sys.argv.pop(1)
def die(plan, state, *rest):
    if int(state.step) + 1 == at:
        os._exit(9) if how == "killed" else signal.raise_signal(signal.SIGTERM)
    return step(plan, state, *rest)
loop.train_step = die
exit_with_one_line(lambda: recover.run(sys.argv[1:]))
"""


def cut_off(line, step, how):
    program = [sys.executable, "-c", CUT_OFF, str(step), how, *line]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment())


def test_stopped_and_killed_and_resumed(line, recovered, tmp_path):
    """By SIGTERM in step 4, killed in step 6, each time between checkpoints: the same bytes in the end."""
    stopped = cut_off(line, 4, "stopped")
    assert stopped.returncode == 143, stopped.stderr
    _, kept, last = stopped.stderr.splitlines()
    assert kept == f"step 2 is kept in {tmp_path / 'out.run'}; the same command with --resume continues from there"
    assert last == "error: interrupted by SIGTERM"
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]
    assert cut_off([*line, "--resume"], 6, "killed").returncode == 9
    with pytest.raises(BarberError, match="holds an unfinished run; --resume continues it, --overwrite starts over"):
        recover.run(line)
    recover.run([*line, "--resume"])
    assert_same(tmp_path / "out", recovered)


def fail_at(patch, step, error):
    """The checkpoint of a step cannot be written."""
    save = ocp.CheckpointManager.save

    def fail(manager, number, *rest, **options):
        if number == step:
            raise error
        return save(manager, number, *rest, **options)

    patch.setattr(ocp.CheckpointManager, "save", fail)


@pytest.fixture(scope="module")
def unfinished(tiny, tiny_pruned, tiny_ids, tmp_path_factory):
    """A run's folder with the checkpoint of step 4, of which the disk was full at step 6."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BarberError) as error:
        fail_at(patch, 6, ValueError("RESOURCE_EXHAUSTED: No space left on device"))
        run_recovery(folder / "out", tiny_pruned, tiny_ids, "--teacher", tiny(), *RUN)
    assert "out.run/6 (RESOURCE_EXHAUSTED: No space left on device); free some space there" in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["out.run"]
    return folder / "out.run"


def test_a_full_disk_loses_no_earlier_checkpoint(unfinished, line, recovered, tmp_path):
    assert {path.name for path in unfinished.iterdir()} == {"identity.json", "4"}
    shutil.copytree(unfinished, tmp_path / "out.run")
    recover.run([*line, "--resume"])
    assert_same(tmp_path / "out", recovered)


def test_a_full_disk_at_the_start_leaves_nothing(line, monkeypatch, tmp_path, capfd):
    fail_at(monkeypatch, 0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BarberError, match="No space left on device"):
        recover.run(line)
    assert list(tmp_path.iterdir()) == []
    assert "--resume" not in capfd.readouterr().err


STAGES = [
    (recover, "prepare", 0),
    (recover, "begin", 0),
    *(pytest.param(*stage, marks=pytest.mark.slow) for stage in ((recover, "load_masks", 0), (loop, "train_step", 0))),
    *(
        pytest.param(*stage, marks=pytest.mark.slow)
        for stage in ((recover, "chosen_values", 2), (FolderWriter, "write_pruned", 2), (FolderWriter, "finish", 2))
    ),
    (recover, "write_recover_card", 2),
    pytest.param(FolderWriter, "publish", 2, marks=pytest.mark.slow),
]
"""Place and name of what raises, and the step that can be resumed from; 0 for none."""


@pytest.mark.parametrize(("place", "name", "step"), STAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_nobody_expected_at_any_stage(place, name, step, line, monkeypatch, tmp_path, capsys):
    """One line and status 1, with a log, and nothing is published; what was trained is kept."""

    def boom(*_, **__):
        raise RuntimeError("boom")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(causes.tempfile, "tempdir", str(tmp_path / "logs"))
    monkeypatch.setattr(place, name, boom)
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: recover.run([*line, "--steps", "2"]))
    *_, last = capsys.readouterr().err.splitlines()
    (log,) = (tmp_path / "logs").glob("*.log")
    assert stop.value.code == 1 and last.startswith("error: unexpected RuntimeError: boom; ") and str(log) in last
    assert {path.name for path in tmp_path.iterdir()} == {"logs", *(["out.run"] if step else [])}
    if step:
        assert (tmp_path / "out.run" / str(step)).is_dir()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "0.003"], "--rate was 0.002 in the run"),
        (["--steps", "8"], "--steps was 6 in the run"),
        (["--seed", "1"], "--seed was 0 in the run"),
        (["--batch", "8"], "--batch was 4 in the run"),
    ],
)
def test_resume_with_another_option(options, says, unfinished, line, tmp_path):
    shutil.copytree(unfinished, tmp_path / "out.run")
    with pytest.raises(BarberError) as error:
        recover.run([*line, *options, "--resume"])
    assert says in str(error.value) and "start over with --overwrite" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


def test_resume_with_another_teacher_or_text(unfinished, line, tiny, tiny_ids, tmp_path):
    shutil.copytree(unfinished, tmp_path / "out.run")
    other = shutil.copytree(tiny(), tmp_path / "other")
    content = bytearray((other / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (other / WEIGHTS).write_bytes(content)
    with pytest.raises(BarberError, match=r"content of --teacher model\.safetensors differs"):
        recover.run([*line, "--teacher", str(other), "--resume"])
    np.save(tmp_path / "ids.npy", np.load(tiny_ids)[::-1])
    with pytest.raises(BarberError, match="content of the text differs"):
        recover.run([*line, "--text", str(tmp_path / "ids.npy"), "--resume"])
    # Beside the run that was asked for there is none.
    with pytest.raises(BarberError, match="no unfinished run"):
        recover.run([*line, "--out", str(tmp_path / "another"), "--resume"])


def damage_arrays(folder):
    """One bit of every file with arrays."""
    for path in folder.glob("state/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def truncate_arrays(folder):
    for path in folder.glob("state/d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def damage_progress(folder):
    (path,) = (path for path in (folder / "progress").iterdir() if b"training" in path.read_bytes())
    path.write_text('{"log": 7}')


def forget_progress(folder):
    shutil.rmtree(folder / "progress")


@pytest.mark.parametrize("damage", [damage_arrays, truncate_arrays, damage_progress, forget_progress])
def test_damaged_checkpoints(damage, unfinished, line, tmp_path, capfd):
    shutil.copytree(unfinished, tmp_path / "out.run")
    damage(tmp_path / "out.run" / "4")
    with pytest.raises(BarberError) as error:
        recover.run([*line, "--resume"])
    assert "out.run/4: damaged (" in str(error.value) and "start over with --overwrite" in str(error.value)
    # It would fail again.
    assert "--resume continues" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


def test_damaged_checkpoints_from_the_command_line(unfinished, line, tmp_path):
    """Orbax leaves the reading of other arrays when one of them is damaged, and asyncio would tell of each."""
    shutil.copytree(unfinished, tmp_path / "out.run")
    truncate_arrays(tmp_path / "out.run" / "4")
    done = command("recover", *line, "--resume")
    _, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith(f"error: {tmp_path / 'out.run' / '4'}: damaged ("), done.stderr


def test_folders_and_files_that_are_in_the_way(line, recovered, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BarberError, match="file"):
        recover.run([*line, "--log-dir", str(tmp_path / "file")])
    for inside in ("out", "out/logs", "out.partial/a/b", "out.run", "out.text/x"):
        with pytest.raises(BarberError, match=r"--log-dir .* is or is inside .*, which the run itself writes"):
            recover.run([*line, "--log-dir", str(tmp_path / inside)])
    (tmp_path / "out").mkdir()
    with pytest.raises(BarberError, match="exists; give --overwrite"):
        recover.run(line)
    with pytest.raises(BarberError, match="is or is inside"):
        recover.run([*line, "--out", f"{line[1]}/out"])
    with output_lock(tmp_path / "busy"), pytest.raises(BarberError, match="is being written by process"):
        recover.run([*line, "--out", str(tmp_path / "busy")])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_bad_input_from_the_command_line(line):
    done = command("recover", *line, "--rank", 4)
    assert (done.returncode, done.stderr) == (2, "error: --rank 4 needs --scope lora\n")


def test_verbose_progress(line, capfd):
    recover.run([*line, "--verbose", "--steps", "4"])
    lines = capfd.readouterr().err.splitlines()
    steps = [each for each in lines if each.startswith("recovering: step ")]
    assert any("step 3 of 4, loss " in each and "tokens/s, about" in each and "held-out" in each for each in steps)
    assert steps[-1].startswith("recovering: step 4 of 4, held-out ")
    assert steps[0].startswith("recovering: step 0 of 4, held-out ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("seed", range(CRASHES))
def test_ended_at_a_random_moment(seed, number, line, recovered, tmp_path):
    """Three times, each resumed where there is something to resume."""
    out, rng = tmp_path / "out", random.Random(f"{number} {seed}")
    for _ in range(3):
        resume = ["--resume"] if (tmp_path / "out.run" / "identity.json").exists() else []
        program = [sys.executable, "-m", "barber_jax.recover", *line, *resume]
        process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment())
        while not (tmp_path / "out.run" / "0").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        assert "Traceback" not in said, said
        assert process.returncode in (0, -number, 128 + number), said
        if out.exists():
            break
    if not out.exists():
        resume = ["--resume"] if (tmp_path / "out.run" / "identity.json").exists() else []
        recover.run([*line, *resume])
    shutil.rmtree(tmp_path / "out.run", ignore_errors=True)
    (tmp_path / ".out.lock").unlink(missing_ok=True)
    assert_same(out, recovered)


@pytest.mark.slow
def test_a_disk_that_fills_up(line, recovered, tmp_path):
    """No file may be larger than 100 KiB: the weights are 87, a checkpoint's parameters and moments more."""
    line += ["--scope", "all", "--compilation-cache", "off"]
    limited = f'ulimit -f 100; exec {sys.executable} -m barber_jax.recover "$@"'
    done = subprocess.run(["bash", "-c", limited, "-", *line], capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr
    _, last = done.stderr.splitlines()
    assert last.startswith(f"error: cannot write {tmp_path / 'out.run' / '2'} ("), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(line, recovered, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*line, "--micro-batch", "4", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "barber_jax.recover", *arguments, str(index)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2),
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0].startswith("4 x cpu") and not said[1], said
    record = json.loads((tmp_path / "out" / "recover.json").read_text())
    for kind in ("training", "evaluations"):
        ours, theirs = ([each["loss"] for each in r[kind]] for r in (record, recovered[1]))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert (tmp_path / "out" / MASKS).read_bytes() == (recovered[0] / MASKS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
