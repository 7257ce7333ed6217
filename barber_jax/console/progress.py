"""Show a command's progress on stderr: a live bar on a terminal, otherwise a plain line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from barber_jax.console.streams import ForgivingStream
from barber_jax.console.terminal import plain_console


class Progress:
    """Progress of a command that has one or several phases. A context manager.

    Args:
        verbose: print a line for every sub-block, or training step.
        plain_every: seconds between lines where stderr is not a terminal.
        silent: print nothing, for the processes of a multi-host run other than the primary one.
    """

    def __init__(self, verbose: bool = False, plain_every: float = 20.0, silent: bool = False):
        self.verbose, self.plain_every = verbose, plain_every
        stderr = ForgivingStream(sys.stderr)
        # In a log file a line must stay one line: rich would wrap it at 80 columns.
        self._console = plain_console(stderr, 10_000, silent)
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

    @property
    def live(self) -> bool:
        """Whether a live bar is shown."""
        return self._console.is_terminal

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print one line, above the live bar if there is one."""
        self.bar.console.print(line, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int, announce: bool = False) -> Iterator["Phase"]:
        """Context manager for a phase of `total` decoder blocks, with its own bar.

        Args:
            announce: print a line when the phase starts, where there is no live bar.
        """
        if announce and not self.live:
            self.say(f"{name} ...")
        phase = Phase(self, name, total)
        try:
            yield phase
        finally:
            self.bar.remove_task(phase.task)

    @contextmanager
    def steps(self, name: str, total: int, start: int = 0) -> Iterator["Steps"]:
        """Context manager for a training loop of `total` steps, with its own bar.

        Args:
            start: steps that an earlier process has done, where a run is resumed.
        """
        steps = Steps(self, name, total, start)
        try:
            yield steps
        finally:
            self.bar.remove_task(steps.task)


class Phase:
    """One phase of a command; created by `Progress.phase`."""

    def __init__(self, progress: Progress, name: str, total: int):
        self._progress, self._name, self._total, self._done = progress, name, total, 0
        self.task = progress.bar.add_task(name, total=total, note="")
        self._start = self._last_line = time.monotonic()

    def stage(self, block: int, name: str) -> None:
        """Show beside the bar which stage a block is in."""
        self._progress.bar.update(self.task, description=f"{self._name}: block {block} {name}")

    def advance(self, note: str = "", detail: str = "") -> None:
        """Count one more finished block; `note` is shown beside the bar, `detail` in a plain line."""
        self._done += 1
        self._progress.bar.update(self.task, advance=1, note=note)
        now = time.monotonic()
        if self._progress.live or self._progress.verbose or now - self._last_line <= self._progress.plain_every:
            return
        self._last_line = now
        left = (now - self._start) / self._done * (self._total - self._done)
        more = f"; {detail}" if detail else ""
        self._progress.say(f"{self._name}: {self._done} of {self._total} blocks done, about {left:.0f} s left{more}")

    def block_pruned(self, record: dict) -> None:
        """Count a pruned block and report its losses and swaps; `record` is its entry in run.json."""
        lines = [f"block {record['block']} {_format_sub_block(sub)}" for sub in record["sub_blocks"]]
        self.advance(_format_losses(record["sub_blocks"][-1]), lines[-1])
        if self._progress.verbose:
            for line in lines:
                self._progress.say(line)
            seconds = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in record["seconds"].items())
            self._progress.say(f"block {record['block']} {seconds}")


class Steps:
    """The steps of a training loop; created by `Progress.steps`."""

    def __init__(self, progress: Progress, name: str, total: int, start: int):
        self._progress, self._name, self._total, self._first = progress, name, total, start
        self._held_out: float | None = None
        self.task = progress.bar.add_task(name, total=total, completed=start, note="")
        self._start = self._last_line = time.monotonic()

    def step(
        self,
        number: int,
        loss: float | None = None,
        held_out: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Show that steps 1 to `number` are done, and what was measured.

        Args:
            loss: of this step, or a mean over the last ones.
            held_out: loss on the held-out text; shown until there is a newer one.
            tokens_per_second: trained tokens per second.
        """
        self._held_out = self._held_out if held_out is None else held_out
        parts = [
            *([f"loss {loss:.4g}"] if loss is not None else []),
            *([f"held-out {self._held_out:.4g}"] if self._held_out is not None else []),
            *([f"{tokens_per_second:.0f} tokens/s"] if tokens_per_second is not None else []),
        ]
        self._progress.bar.update(self.task, completed=number, note=", ".join(parts))
        now = time.monotonic()
        often = self._progress.verbose or now - self._last_line > self._progress.plain_every
        if self._progress.live or not often:
            return
        self._last_line = now
        done = number - self._first
        if done > 0:
            parts.append(f"about {(now - self._start) / done * (self._total - number):.0f} s left")
        self._progress.say(", ".join([f"{self._name}: step {number} of {self._total}", *parts]))


@dataclass
class Stopwatch:
    """Measures the seconds spent in each stage of one block.

    Attributes:
        phase: shows the current stage.
        block: index of the block.
        seconds: stage -> seconds.
    """

    phase: Phase
    block: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context manager that times a stage. Inside it, wait for the results: JAX dispatches asynchronously.

        An exception that passes gets a note of the stage.
        """
        self.phase.stage(self.block, name)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"block {self.block}, {name}")
            raise
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _format_losses(sub: dict) -> str:
    if "loss_before" not in sub:
        return ""
    return f"loss {sub['loss_before']:.4g} -> {sub['loss_after']:.4g}"


def _format_sub_block(sub: dict) -> str:
    parts = [f"{sub['name']}: sparsity {sub['sparsity']:.4f}", _format_losses(sub)]
    if "swaps" in sub:
        parts.append(f"{sub['swaps']} swaps")
    return ", ".join(part for part in parts if part)
