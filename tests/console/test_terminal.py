"""Names are printed as they are, and a log file is no terminal."""

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from barber_jax.console.progress import Progress
from barber_jax.console.terminal import plain_console
from barber_jax.eval import against_torch, device_check

ODD = "/a[/b]/[red]c :dog: \\[x] [/]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_names_are_printed_letter_by_letter(kind):
    stream, table = kind(), Table(title=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    console = plain_console(stream, width=100)
    console.print(table)
    console.print(ODD, soft_wrap=True)
    assert stream.getvalue().count(ODD) == 4


def test_progress_prints_names_letter_by_letter(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as progress, progress.phase(ODD, 2) as phase:
        progress.say(ODD)
        phase.advance(note=ODD)
    assert ODD in sys.stderr.getvalue()


def test_a_log_file_is_no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress() as progress, progress.phase("pruning", 2) as phase:
        phase.advance()
        progress.say("x" * 300)
    assert sys.stderr.getvalue() == "x" * 300 + "\n"


def test_a_checkpoint_and_an_error_with_brackets(monkeypatch, capsys):
    """Each of these once ended in rich's MarkupError, after all the work."""
    config = against_torch.AgainstTorchConfig(ckpt="m[/x]", tokens=Path("a"))
    program = {"seconds": [1.0], "perplexity": 2.0}
    figures = {"programs": dict.fromkeys(("transformers", "barber_jax"), program), "tokens": 3}
    against_torch.show_perplexity(config, figures)
    assert "m[/x]" in capsys.readouterr().out

    def fail(step, left):
        step.status, step.error = "failed", "no such file: [/tmp/x]"

    monkeypatch.setattr(device_check, "run_step", fail)
    step = device_check.Step(part="masks", name="[/a]", module="m", arguments=())
    device_check.run_group([step], 10, "cpu", plain_console(sys.stderr))
    assert "masks, [/a]: failed in 0 s no such file: [/tmp/x]" in capsys.readouterr().err
