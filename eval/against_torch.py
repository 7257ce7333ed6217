"""python -m barber_jax.eval.against_torch: time perplexity, or recovery, in barber_jax and in transformers on PyTorch.

Both evaluate the same checkpoint on the same windows in float32, or with --recover train it on the same batches. The
measurements alternate, so that other load on the machine affects both alike. Needs the extra `torch`.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.console.options import flag
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.console.terminal import plain_console
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.torch_model import load_model
from barber_jax.data.calibration import load_ids
from barber_jax.data.windows import cut_windows
from barber_jax.devices.settings import prepare_jax
from barber_jax.eval import against_torch_recover
from barber_jax.forward.perplexity import perplexity
from barber_jax.models import build_model


@dataclass(frozen=True)
class AgainstTorchConfig:
    """Compare the speed of perplexity, or of recovery, in barber_jax and in transformers on PyTorch, in float32."""

    ckpt: str
    """Hugging Face checkpoint folder, read by both; with --recover a pruned one."""
    tokens: Path
    """Token ids: .npy of integers, flattened. With --recover also a text that barber_jax.recover's --text takes."""
    length: int = 1024
    """Tokens in a window."""
    windows: int = 8
    """Number of windows. Not with --recover."""
    repeat: int = 3
    """Timed measurements of each; the fastest is reported. Not with --recover."""
    recover: bool = False
    """Train instead, as barber_jax.recover does, and compare the loss of every step."""
    teacher: str | None = None
    """With --recover: dense checkpoint folder. Default: none, next-token cross-entropy alone."""
    batch: int = 4
    """With --recover: windows in each step."""
    micro_batch: int | None = None
    """With --recover: windows computed at a time. Default: as barber_jax.recover chooses."""
    steps: int = 20
    """With --recover: steps; the first compiles and is not timed."""
    rate: float = 0.002
    """With --recover: peak learning rate, as a fraction of the root mean square of a matrix's surviving weights."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self):
        for option, least in (("length", 2), ("windows", 1), ("repeat", 1), ("steps", 2)):
            if getattr(self, option) < least:
                raise BarberError(f"--{option} {getattr(self, option)} must be at least {least}")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        others = ("windows", "repeat") if self.recover else ("teacher", "batch", "micro_batch", "steps", "rate")
        for option in others:
            if getattr(self, option) != fields[option]:
                needed = "is not used with --recover" if self.recover else "needs --recover"
                raise BarberError(f"{flag(option)} {getattr(self, option)} {needed}")


def torch_perplexity(folder: str, windows: np.ndarray) -> Callable[[], float]:
    """Load a checkpoint with transformers and return a function that computes its perplexity, one window at a time.

    Args:
        folder: Hugging Face checkpoint.
        windows: int32 [N, L] token ids.
    """
    import torch

    model = load_model(folder, "--ckpt", dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model = model.cuda()

    def measure() -> float:
        total = 0.0
        with torch.inference_mode():
            for window in windows:
                ids = torch.as_tensor(window[None], dtype=torch.long, device=model.device)
                logits = model(ids, use_cache=False).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        return math.exp(total / len(windows))

    return measure


def run(arguments: list[str] | None = None) -> None:
    """Command line: print a table of times and of what was computed, and write the figures to --json."""
    config = parse(AgainstTorchConfig, "barber_jax.eval.against_torch", arguments)
    prepare_jax()
    with output_file(config.json) as file:
        if config.recover:
            names = [field.name for field in dataclasses.fields(against_torch_recover.Training)]
            given = {name: getattr(config, name) for name in names if name != "text"}
            training = against_torch_recover.Training(text=str(config.tokens), **given)
            figures = against_torch_recover.compare(training)
            show = functools.partial(against_torch_recover.show, training)
        else:
            figures = compare_perplexity(config)
            show = functools.partial(show_perplexity, config)
        # Before it is printed: standard output may be gone.
        if file:
            options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
            write_whole(file, json.dumps({"options": options, **figures}, indent=1) + "\n")
    show(figures)


def compare_perplexity(config: AgainstTorchConfig) -> dict:
    """Measure perplexity on both sides in turn.

    Returns:
        `programs`: name -> `perplexity`, and the `seconds` of every measurement. `tokens`: of a measurement.
    """
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, np.dtype(np.float32))
    ids = load_ids(config.tokens)
    windows = cut_windows(ids, config.length, config.windows, str(config.tokens), model.vocabulary)
    with needs("torch"):
        measure_torch = torch_perplexity(config.ckpt, windows)
    programs = {
        "barber_jax": lambda: perplexity(checkpoint, model, windows)["perplexity"],
        "transformers": measure_torch,
    }
    values = {name: measure() for name, measure in programs.items()}  # also compiles and warms up
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(config.repeat):
        for name, measure in programs.items():
            start = time.perf_counter()
            measure()
            seconds[name].append(time.perf_counter() - start)
    figures = {name: {"perplexity": values[name], "seconds": seconds[name]} for name in programs}
    return {"programs": figures, "tokens": windows.size}


def show_perplexity(config: AgainstTorchConfig, figures: dict) -> None:
    """Print the result of `compare_perplexity` as a table."""
    table = Table(title=f"{config.ckpt}, {config.windows} windows of {config.length} tokens, float32")
    for column in ("", "perplexity", "seconds", "tokens per second", "speed vs transformers"):
        table.add_column(column, justify="right" if column else "left")
    baseline = min(figures["programs"]["transformers"]["seconds"])
    for name, program in figures["programs"].items():
        best = min(program["seconds"])
        speed, relative = f"{figures['tokens'] / best:.0f}", f"{baseline / best:.2f} x"
        table.add_row(name, f"{program['perplexity']:.4f}", f"{best:.2f}", speed, relative)
    plain_console().print(table)


if __name__ == "__main__":
    exit_with_one_line(run)
