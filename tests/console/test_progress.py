"""Progress where stderr is no terminal: few plain lines, one for each phase that is announced."""

import io
import subprocess
import sys

import pytest

from barber_jax.console import progress as module
from barber_jax.console.progress import Progress, Stopwatch


def record(block):
    sub = {"name": "mlp", "sparsity": 0.5, "loss_before": 2.0, "loss_after": 1.0, "swaps": 3}
    return {"block": block, "sub_blocks": [sub], "seconds": {"start": 0.25}}


def test_plain_lines_come_at_most_every_so_often(capsys, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Progress(plain_every=20) as progress, progress.phase("pruning", 12) as phase:
        for block in range(12):
            phase.block_pruned(record(block))
    lines = capsys.readouterr().err.splitlines()
    # The clock moves 7 seconds a block: a line for every third.
    assert len(lines) == 4
    assert lines[0].startswith("pruning: 3 of 12 blocks done, about 63 s left; block 2 mlp: sparsity 0.5000")


def test_a_phase_is_announced_and_a_silent_one_is_not(capsys):
    with Progress() as progress, progress.phase("perplexity of the dense model", 3, announce=True) as phase:
        phase.advance()
    assert capsys.readouterr().err == "perplexity of the dense model ...\n"
    with Progress(silent=True) as progress, progress.phase("nothing", 3, announce=True):
        progress.say("nothing either")
    assert capsys.readouterr().err == ""


def test_verbose_says_every_sub_block(capsys):
    with Progress(verbose=True) as progress, progress.phase("pruning", 2) as phase:
        phase.block_pruned(record(0))
    said = capsys.readouterr().err
    assert "block 0 mlp: sparsity 0.5000, loss 2 -> 1, 3 swaps" in said and "block 0 start 0.25 s" in said


def test_steps_say_losses_rate_and_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Progress(plain_every=20) as progress, progress.steps("recovering", 1000, start=100) as steps:
        for number in range(101, 107):
            held_out = 0.58 if number == 102 else None
            steps.step(number, loss=number / 100, held_out=held_out, tokens_per_second=1234.4)
    # 7 seconds a step: a line for every third. The steps of an earlier process took this one no time.
    assert capsys.readouterr().err.splitlines() == [
        "recovering: step 103 of 1000, loss 1.03, held-out 0.58, 1234 tokens/s, about 6279 s left",
        "recovering: step 106 of 1000, loss 1.06, held-out 0.58, 1234 tokens/s, about 6258 s left",
    ]


def test_verbose_says_every_step_with_what_is_known(capsys, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    with Progress(verbose=True) as progress, progress.steps("recovering", 2) as steps:
        steps.step(0, held_out=0.75)
        steps.step(1, loss=float("nan"))
    assert capsys.readouterr().err.splitlines() == [
        "recovering: step 0 of 2, held-out 0.75",
        "recovering: step 1 of 2, loss nan, held-out 0.75, about 0 s left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_of_a_resumed_loop_starts_where_it_was(monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", terminal := Terminal())
    with Progress() as progress, progress.steps("recovering", 1000, start=100) as steps:
        (task,) = progress.bar.tasks
        assert task.completed == 100
        steps.step(101, loss=0.5)
        assert (task.completed, task.fields["note"]) == (101, "loss 0.5")
    assert not progress.bar.tasks
    assert "step 101 of" not in terminal.getvalue()


def test_a_stopwatch_adds_up(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with Progress(silent=True) as progress, progress.phase("pruning", 1) as phase:
        watch = Stopwatch(phase, 0)
        for _ in range(2):
            with watch.stage("start"):
                pass
    assert watch.seconds == {"start": 3.0}


@pytest.mark.parametrize("torch", ["import sys; sys.modules['torch'] = None\n", ""], ids=["without", "with"])
def test_no_command_says_that_pytorch_is_missing(torch):
    code = f"""{torch}
from barber_jax.console import exit_with_one_line
def main():
    import transformers
    print("done")
exit_with_one_line(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
