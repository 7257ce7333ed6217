"""The recovery side of `barber_jax.eval.against_torch`: the same training in barber_jax and in PyTorch, step by step.

Both train the surviving weights of the same checkpoint on the same batches in float32, with the same teacher, learning
rates, clipping and Adam. PyTorch's is the usual loop over transformers' model: `torch.optim.Adam` (its fused kernel)
with a parameter group for each matrix, masks applied to gradients and weights in each step. It keeps all
activations for the gradient; barber_jax computes again what `--remat auto` says.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from barber_jax.console.errors import BarberError
from barber_jax.console.extras import needs
from barber_jax.console.progress import Progress
from barber_jax.console.terminal import plain_console
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.torch_model import load_model
from barber_jax.data.packing import batches
from barber_jax.recover import begin
from barber_jax.recovery.inputs import Prepared, prepare
from barber_jax.recovery.program import ALL
from barber_jax.recovery.recover_config import RecoverConfig
from barber_jax.recovery.training import B1, B2, MIN_SCALE, learning_rates, train_step

Step = Callable[[np.ndarray, int], float]
"""Trains on a batch, int32 [batch, L], as step number n (from 0); returns the loss of the batch before the update."""


@dataclass(frozen=True)
class Training:
    """What both sides train; the options of `barber_jax.recover` of these names."""

    ckpt: str
    teacher: str | None
    text: str
    length: int
    batch: int
    micro_batch: int | None
    steps: int
    rate: float


def compare(training: Training) -> dict[str, Any]:
    """Train on both sides, a step on each in turn, so that other load on the machine affects both alike.

    Returns:
        `programs`: name -> `losses` and `seconds` of every step, and `tokens_per_second` from the median of the seconds
        of all steps but the first, which compiles; `largest_difference` of the losses; `torch_threads`, `torch`,
        `transformers` (versions).

    Raises:
        BarberError: as a recovery does for unusable inputs; a checkpoint is not a Hugging Face folder, which
            transformers reads; PyTorch is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        config = RecoverConfig(**vars(training), held_out=1, out=Path(scratch) / "out")
        run = prepare(config, progress)
        for option, checkpoint in (("--ckpt", run.checkpoint), ("--teacher", run.teacher)):
            if checkpoint and not isinstance(checkpoint, HFFolder):
                raise BarberError(
                    f"{option} {checkpoint.location} is not a Hugging Face folder, which transformers could read; "
                    "python -m barber_jax.convert makes one of it"
                )
        with needs("torch"):
            import torch
            import transformers

            transformers.utils.logging.disable_progress_bar()
            programs = {"barber_jax": barber_jax_step(run), "transformers": torch_step(run)}
        losses: dict[str, list[float]] = {name: [] for name in programs}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        iterator = batches(run.text, batch=run.config.batch, seed=run.config.seed)
        with progress.steps("training on both sides", training.steps) as shown:
            for number in range(training.steps):
                ids = next(iterator)
                for name, step in programs.items():
                    start = time.perf_counter()
                    losses[name].append(step(ids, number))
                    seconds[name].append(time.perf_counter() - start)
                shown.step(number + 1, loss=losses["barber_jax"][-1])
    tokens = training.batch * training.length
    return {
        "programs": {
            name: {
                "losses": losses[name],
                "seconds": seconds[name],
                "tokens_per_second": tokens / statistics.median(seconds[name][1:]),
            }
            for name in programs
        },
        "largest_difference": float(np.max(np.abs(np.subtract(*losses.values())))),
        "torch_threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers)},
    }


def barber_jax_step(run: Prepared) -> Step:
    """The step that `barber_jax.recover` makes."""
    setup, state = begin(run)

    def step(ids: np.ndarray, number: int) -> float:
        nonlocal state
        rows = setup.devices.put_share(ids.reshape(-1, setup.micro_batch, ids.shape[-1]), None, ALL)
        arguments = (setup.scales, setup.frozen, setup.masks, setup.teacher)
        state, metrics = train_step(setup.plan, state, *arguments, rows, setup.rates[number])
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def torch_step(run: Prepared) -> Step:
    """The same step of transformers' model in PyTorch."""
    import torch
    from torch.nn import functional

    config = run.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(checkpoint: HFFolder, option: str) -> torch.nn.Module:
        model = load_model(str(checkpoint.folder), option, dtype=torch.float32)
        # No dropout: it would make the losses differ, and distillation does without.
        return model.eval().requires_grad_(False).to(device)

    student = load(run.checkpoint, "--ckpt")
    teacher = load(run.teacher, "--teacher") if run.teacher else None
    weights = {name: student.get_parameter(name).requires_grad_() for name in run.model.pruned_names()}
    masks = {name: torch.from_numpy(run.masks.read(name)).to(device, torch.float32) for name in weights}
    scales = {}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
            scales[name] = max(float((weight.square().sum() / masks[name].sum().clamp(min=1)).sqrt()), MIN_SCALE)
    groups = [{"params": [weight], "name": name} for name, weight in weights.items()]
    adam = torch.optim.Adam(groups, betas=(B1, B2), eps=1e-8, fused=True)
    rates = learning_rates(config.rate, config.steps, config.warm_up)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        ours = functional.log_softmax(student(ids, use_cache=False).logits[:, :-1], dim=-1).flatten(0, 1)
        if teacher is None:
            return functional.nll_loss(ours, ids[:, 1:].flatten())
        with torch.no_grad():
            dense = functional.log_softmax(teacher(ids, use_cache=False).logits[:, :-1], dim=-1).flatten(0, 1)
        return functional.kl_div(ours, dense, reduction="batchmean", log_target=True)

    def step(ids: np.ndarray, number: int) -> float:
        pieces = torch.from_numpy(ids).to(device, torch.long).split(config.micro_batch)
        adam.zero_grad(set_to_none=True)
        total = 0.0
        for piece in pieces:
            loss = loss_of(piece) / len(pieces)
            loss.backward()
            total += loss.item()
        for name, weight in weights.items():
            weight.grad.mul_(masks[name])
        torch.nn.utils.clip_grad_norm_(weights.values(), config.clip)
        for group in adam.param_groups:
            group["lr"] = float(rates[number]) * scales[group["name"]]
        adam.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return total

    return step


def show(training: Training, figures: dict[str, Any]) -> None:
    """Print the result of `compare` as a table."""
    size = f"{training.steps} steps of {training.batch} x {training.length} tokens"
    table = Table(title=f"{training.ckpt}, {size}, float32")
    columns = ("loss, first step", "loss, last step", "seconds a step", "tokens per second", "relative speed")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    baseline = figures["programs"]["transformers"]["tokens_per_second"]
    for name, program in figures["programs"].items():
        first, last, speed = program["losses"][0], program["losses"][-1], program["tokens_per_second"]
        seconds = training.batch * training.length / speed
        table.add_row(
            name, f"{first:.5f}", f"{last:.5f}", f"{seconds:.2f}", f"{speed:.0f}", f"{speed / baseline:.2f} x"
        )
    console = plain_console()
    console.print(table)
    console.print(f"largest difference of the losses of a step: {figures['largest_difference']:.1e}")
