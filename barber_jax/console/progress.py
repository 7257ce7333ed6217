"""What a person watches during a run: a live line on a terminal, few plain lines elsewhere. Everything on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of a run over `blocks` blocks; a context manager.

    Args:
        blocks: how many there are.
        verbose: a line for every sub-block.
        plain_every: seconds between lines where the output is not a terminal.
        silent: say nothing at all: another process does.
    """

    def __init__(self, blocks: int, verbose: bool = False, plain_every: float = 60.0, silent: bool = False):
        self._blocks, self._verbose, self._plain_every = blocks, verbose, plain_every
        # Not a terminal: no wrapping to rich's default of 80 columns, a log line stays one line.
        width = None if sys.stderr.isatty() else 10_000
        self._console = Console(file=sys.stderr, highlight=False, width=width, quiet=silent)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=blocks, loss="")
        self._start = self._spoke = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print one line, above the live one if there is one."""
        self._bar.console.print(line, markup=False, soft_wrap=True)

    def stage(self, block: int, name: str) -> None:
        """A stage of a block begins."""
        self._bar.update(self._task, description=f"block {block} {name}")

    def done(self, record: dict) -> None:
        """A block is finished; `record` is its entry in run.json."""
        lines = [f"block {record['block']} {_summary(sub)}" for sub in record["sub_blocks"]]
        self._bar.update(self._task, advance=1, loss=_loss(record["sub_blocks"][-1]))
        if self._verbose:
            for line in lines:
                self.say(line)
            self.say(f"block {record['block']} " + ", ".join(f"{k} {v:.2f} s" for k, v in record["seconds"].items()))
        elif not self._console.is_terminal and time.monotonic() - self._spoke > self._plain_every:
            self._spoke = time.monotonic()
            finished = record["block"] + 1
            left = (self._spoke - self._start) / finished * (self._blocks - finished)
            self.say(f"{finished} of {self._blocks} blocks done, about {left:.0f} s left; {lines[-1]}")


@dataclass
class Stopwatch:
    """Seconds spent in each stage of one block."""

    progress: Progress
    block: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what it computes must be ready when it ends."""
        self.progress.stage(self.block, name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _loss(sub: dict) -> str:
    if "loss_before" not in sub:
        return ""
    return f"loss {sub['loss_before']:.4g} -> {sub['loss_after']:.4g}"


def _summary(sub: dict) -> str:
    parts = [f"{sub['name']}: sparsity {sub['sparsity']:.4f}", _loss(sub)]
    if "swaps" in sub:
        parts.append(f"{sub['swaps']} swaps")
    return ", ".join(part for part in parts if part)
