"""The loop over the steps of a recovery: trains, measures the loss on held-out text, keeps checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.progress import Steps
from barber_jax.devices.mesh import Devices
from barber_jax.forward.passes import Parameters
from barber_jax.recovery.checkpoints import Checkpoints
from barber_jax.recovery.program import ALL
from barber_jax.recovery.training import Plan, State, held_out_losses, train_step

METRICS = ("loss", "kl", "cross_entropy", "gradient_norm")


@dataclass
class Log:
    """What is measured, and kept in checkpoints.

    Attributes:
        training: an entry for every step: step, loss, kl, cross_entropy, gradient_norm, rate.
        evaluations: an entry for every measurement on held-out text: step, loss, kl, cross_entropy, seconds.
        best_step: step of the least held-out loss.
        seconds: spent in the loop, by all processes that worked on the run one after the other.
    """

    training: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """What stays the same over the steps.

    Attributes:
        plan: what a step computes.
        scales: of the learning rates.
        frozen, masks, teacher: see `train_step`.
        dtypes: (name, dtype) in which trained parameters will be written.
        rates: float32 [steps] learning rates.
        held_out: int32 [A, B, L] token ids.
        evaluate_at: steps after which the held-out loss is measured.
        micro_batch: windows computed at a time, on all devices together.
        devices: to compute on.
    """

    plan: Plan
    scales: Parameters
    frozen: Parameters
    masks: Parameters
    teacher: Parameters
    dtypes: tuple[tuple[str, str], ...]
    rates: np.ndarray
    held_out: jax.Array
    evaluate_at: frozenset[int]
    micro_batch: int
    devices: Devices


@dataclass
class Outcome:
    """What a recovery gives.

    Attributes:
        state: after the last step.
        log: what was measured.
        diverged: the step whose loss or gradient was not finite, if any.
        earlier_seconds: spent in the loop by earlier attempts, up to the checkpoint that this one began with.
    """

    state: State
    log: Log
    diverged: int | None
    earlier_seconds: float


def run_steps(
    setup: Setup,
    state: State,
    log: Log,
    batches: Iterator[np.ndarray],
    checkpoints: Checkpoints,
    progress: Steps,
    report: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Outcome:
    """Train from the state's step to the last one.

    Args:
        state: to start from; consumed.
        log: of the steps so far; added to.
        batches: this process's windows of each step, int32 [batch / processes, L]; it has `get_state`.
        progress: shows the steps.
        report: called with a step and what was measured of it.
    """
    total, began = len(setup.rates), time.perf_counter()
    before = log.seconds
    first = done = int(state.step)
    if not log.evaluations:
        _evaluate(setup, state, log, done, checkpoints, batches, progress, report)
    clock, timed, pending, diverged = time.perf_counter(), 0, None, None

    def settle() -> bool:
        """Record the step that was computed last; False if it was not finite."""
        nonlocal pending, clock, timed
        if pending is None:
            return True
        number, metrics, tokens = pending
        figures = {name: float(metrics[name]) for name in METRICS}
        pending = None
        if not all(math.isfinite(value) for value in figures.values()):
            return False
        entry = {"step": number, **figures, "rate": float(setup.rates[number - 1])}
        log.training.append(entry if setup.teacher else {**entry, "kl": None})
        if number == first + 1:
            clock = time.perf_counter()
        else:
            timed += tokens
        speed = timed / (time.perf_counter() - clock) if timed else None
        progress.step(number, loss=figures["loss"], tokens_per_second=speed)
        report(number, {f"train/{name}": value for name, value in log.training[-1].items() if value is not None})
        return True

    while done < total:
        ids = next(batches)
        tokens = ids.size * jax.process_count()
        rows = ids.reshape(-1, setup.micro_batch // jax.process_count(), ids.shape[-1])
        arguments = (setup.scales, setup.frozen, setup.masks, setup.teacher)
        given = setup.devices.put_share(rows, None, ALL)
        # An interrupt must not lose what is being computed, see `recover.keeping`.
        with interrupt.deferred():
            state, metrics = train_step(setup.plan, state, *arguments, given, setup.rates[done])
        done += 1
        # The step before is read while this one is computed.
        finite = settle()
        pending = (done, metrics, tokens)
        if finite and done in setup.evaluate_at:
            finite = settle()
        if not finite:
            diverged = done - 1 if pending else done
            break
        interrupt.check()
        if done in setup.evaluate_at:
            paused = time.perf_counter()
            log.seconds = before + paused - began
            _evaluate(setup, state, log, done, checkpoints, batches, progress, report)
            clock += time.perf_counter() - paused
    log.seconds = before + time.perf_counter() - began
    return Outcome(state, log, diverged, before)


def _evaluate(
    setup: Setup,
    state: State,
    log: Log,
    step: int,
    checkpoints: Checkpoints,
    batches: Any,
    progress: Steps,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Measure the held-out loss and write a checkpoint."""
    start = time.perf_counter()
    arguments = (state.values, setup.frozen, setup.masks, setup.teacher, setup.held_out)
    with interrupt.deferred():
        found = held_out_losses(setup.plan, setup.dtypes, *arguments)
    entry = {"step": step, **{name: float(value) for name, value in found.items()}}
    if not setup.teacher:
        entry["kl"] = None
    log.evaluations.append({**entry, "seconds": time.perf_counter() - start})
    losses = {each["step"]: each["loss"] for each in log.evaluations if math.isfinite(each["loss"])}
    log.best_step = min(losses, key=losses.get, default=0)
    progress.step(step, held_out=entry["loss"])
    report(step, {f"held_out/{name}": value for name, value in entry.items() if value is not None})
    kept = {"log": vars(log), "text": batches.get_state()}
    checkpoints.save(step, state, kept, keep={log.best_step})
