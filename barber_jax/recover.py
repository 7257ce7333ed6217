"""Command `python -m barber_jax.recover`: train the surviving weights of a pruned checkpoint, its zeros held."""

import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.options import flag
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RECOVER, FolderWriter, claimed, sibling_path
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.parameters import check_tensors
from barber_jax.data.packing import PackedText, batches, open_text
from barber_jax.devices.hosts import join
from barber_jax.devices.mesh import Devices, is_primary, require_agreement
from barber_jax.devices.options import PROCESS_OPTIONS, parse_mesh
from barber_jax.devices.peak import matmul_rates
from barber_jax.devices.settings import prepare_jax
from barber_jax.forward.evaluation import evaluation_windows, measure_perplexity
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.recovery import RecoverConfig, training
from barber_jax.recovery.checkpoints import Checkpoints
from barber_jax.recovery.cost import operations_per_token
from barber_jax.recovery.loop import Log, Outcome, Setup, run_steps
from barber_jax.recovery.objective import Objective
from barber_jax.recovery.program import ALL, Program, load, load_masks
from barber_jax.recovery.result import write_result
from barber_jax.recovery.source import MaskSource, open_masks
from barber_jax.reports.events import EventLog
from barber_jax.reports.model_card import write_model_card
from barber_jax.reports.recover_page import write_recover_report
from barber_jax.reports.recover_record import recover_record
from barber_jax.run.fingerprint import array_fingerprint, fingerprint

MICRO_BATCH_TOKENS = {"cpu": 2048}
"""Platform -> tokens of each device in a micro-batch, unless --micro-batch is given; elsewhere `MANY_TOKENS`."""
MANY_TOKENS = 16384
NOT_COMPARED = (
    *("ckpt", "teacher", "masks", "text", "text_field", "tokens", "steps", "out", "keep", "log_dir"),
    *("overwrite", "resume", "verbose", "eval_text", "eval_dataset", "eval_windows", "compilation_cache"),
    *PROCESS_OPTIONS,
)
"""Options that do not change the weights of a step, and options that name inputs, whose content is compared."""


def recover(config: RecoverConfig) -> dict:
    """Recover a pruned checkpoint and write the result to `config.out`.

    Returns:
        The content of recover.json.

    Raises:
        BarberError: an error that the user can fix. If the loss was not finite at some step, the result is written
            with the best weights before; otherwise nothing is left under --out.
    """
    inputs = [config.ckpt, config.teacher, config.text, config.masks, config.eval_text]
    paths = [Path(given) for given in inputs if given]
    with claimed(config.out, config.overwrite, paths) if is_primary() else contextlib.nullcontext():
        return _recover(config)


@dataclass
class Prepared:
    """All that a run needs, read and checked before the long computation.

    Attributes:
        config: options, with what depends on the inputs filled in: steps, micro_batch, eval_every.
        checkpoint, teacher, model: the pruned checkpoint, the dense one, and what both are.
        masks: of the pruned checkpoint.
        text: windows to train on, and held out.
        windows: int32 [windows, length] evaluation tokens; None to evaluate nothing.
        devices: to compute on.
        identity: what must be the same for the run to be resumed.
    """

    config: RecoverConfig
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    model: Model
    masks: MaskSource
    text: PackedText
    windows: np.ndarray | None
    devices: Devices
    identity: dict[str, Any]


def _recover(config: RecoverConfig) -> dict:
    """Do what `recover` does, with --out claimed."""
    start_time = time.perf_counter()
    with contextlib.ExitStack() as stack, jax.default_matmul_precision(config.matmul_precision):
        progress = stack.enter_context(Progress(config.verbose, silent=not is_primary()))
        run = prepare(config, progress)
        config = run.config
        measure = lambda checkpoint, name: measure_perplexity(config, run.model, run.windows, progress, checkpoint, name)  # noqa: E731, E501
        writer = stack.enter_context(_writer(run)) if is_primary() else None
        checkpoints = stack.enter_context(_checkpoints(run))
        events = stack.enter_context(EventLog(config.log_dir)) if writer and config.log_dir else None
        progress.say(headline(run))
        measured = {}
        if writer:
            measured["dense_perplexity"] = measure(run.teacher, "teacher") if run.teacher else None
            measured["start_perplexity"] = measure(run.checkpoint, "pruned model")
        with run.devices.context():
            peak = max(matmul_rates(run.model, config.micro_batch * config.length, _dtype(config)).values())
            setup, state = begin(run)
            outcome = train(run, setup, state, checkpoints, progress, events)
            values, written_step = chosen(config, setup, outcome, checkpoints)
            movement = write_result(run.checkpoint, run.model, run.masks, run.devices, writer, values)
        record = recover_record(
            options=config.as_dict(),
            model=run.model,
            devices=run.devices.used,
            source=run.checkpoint.location,
            masks=run.masks,
            log=vars(outcome.log),
            written_step=written_step,
            diverged=outcome.diverged,
            movement=movement,
            tokens_per_second=outcome.tokens_per_second,
            operations_per_token=operations_per_token(
                run.model, config.length, config.scope, teacher=run.teacher is not None
            ),
            matmul_flops=peak * len(run.devices.used),
            perplexity=measure(HFFolder(writer.folder), "recovered model") if writer else None,
            seconds=time.perf_counter() - start_time,
            **measured,
        )
        if writer:
            publish(run, record, writer, progress)
        checkpoints.remove()
        progress.say(summary(record))
    if outcome.diverged is not None:
        raise BarberError(
            f"--rate {config.rate:g}: the loss of step {outcome.diverged} is not finite; {config.out} holds the "
            f"weights of step {written_step}, the best before it; lower --rate"
        )
    return record
