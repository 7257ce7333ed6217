"""python -m barber_jax.eval.against_torch: time perplexity in barber_jax and in transformers on PyTorch.

Both evaluate the same checkpoint on the same windows in float32. The measurements alternate, so that other load on the
machine affects both alike. Needs the extra `torch`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.data.calibration import load_ids
from barber_jax.data.windows import cut_windows
from barber_jax.devices.settings import prepare_jax
from barber_jax.forward.perplexity import perplexity
from barber_jax.models import build_model


@dataclass(frozen=True)
class AgainstTorchConfig:
    """Compare the speed of perplexity in barber_jax and in transformers on PyTorch, in float32."""

    ckpt: str
    """Hugging Face checkpoint folder, read by both."""
    tokens: Path
    """Token ids: .npy of integers, flattened."""
    length: int = 1024
    """Tokens in a window."""
    windows: int = 8
    """Number of windows."""
    repeat: int = 3
    """Timed measurements of each; the fastest is reported."""

    def __post_init__(self):
        for option, least in (("length", 2), ("windows", 1), ("repeat", 1)):
            if getattr(self, option) < least:
                raise BarberError(f"--{option} {getattr(self, option)} must be at least {least}")


def torch_perplexity(folder: str, windows: np.ndarray) -> Callable[[], float]:
    """Load a checkpoint with transformers and return a function that computes its perplexity, one window at a time.

    Args:
        folder: Hugging Face checkpoint.
        windows: int32 [N, L] token ids.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
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
    """Command line: print a table of perplexities and times."""
    config = parse(AgainstTorchConfig, "barber_jax.eval.against_torch", arguments)
    prepare_jax()
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
    table = Table(title=f"{config.ckpt}, {config.windows} windows of {config.length} tokens, float32")
    for column in ("", "perplexity", "seconds", "tokens per second", "speed vs transformers"):
        table.add_column(column, justify="right" if column else "left")
    baseline = min(seconds["transformers"])
    for name in programs:
        best = min(seconds[name])
        speed, relative = f"{windows.size / best:.0f}", f"{baseline / best:.2f} x"
        table.add_row(name, f"{values[name]:.4f}", f"{best:.2f}", speed, relative)
    Console().print(table)


if __name__ == "__main__":
    exit_with_one_line(run)
