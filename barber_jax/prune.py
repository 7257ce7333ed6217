"""python -m barber_jax.prune: options -> run -> files."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.config import PruneConfig, parse_mesh
from barber_jax.console import interrupt
from barber_jax.console.command import parse, set_compilation_cache, set_precision
from barber_jax.console.errors import BarberError, DamagedInput, exit_with_one_line
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RUN, FolderWriter, beside, check_destination
from barber_jax.convert.formats import apply_format
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.parameters import check_tensors
from barber_jax.criteria import CRITERIA, allocation
from barber_jax.criteria.starting import CriterionStart, MaskFileStart, SparseCheckpointStart, Start
from barber_jax.data.calibration import load_calibration
from barber_jax.devices.hosts import join
from barber_jax.devices.mesh import Devices, is_primary, require_agreement
from barber_jax.eval.perplexity import cut_windows, evaluation_ids, perplexity
from barber_jax.forward import passes
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.reports.report_page import write_report
from barber_jax.reports.run_record import run_record, totals
from barber_jax.run.fingerprint import array_fingerprint, fingerprint
from barber_jax.run.history import History
from barber_jax.run.run_state import RunState
from barber_jax.run.stream import Pruning


def check(config: PruneConfig, checkpoint: Checkpoint, model: Model, devices: Devices) -> None:
    """Raise BarberError for what can be known to fail before any work is done."""
    check_tensors(checkpoint, model)
    if config.length > model.positions:
        raise BarberError(f"--length {config.length} is more than the model's {model.positions} positions")
    for name in model.kernel_names(0).values():
        config.sparsity_pattern.check_inputs(checkpoint.shape(name)[1], name)
    devices.check(model.block(), config.samples)
    data = devices.shape[0]
    if config.chooses and config.samples < 2 * data:
        raise BarberError(f"--samples {config.samples}: samples are held apart; --mesh data={data} needs {2 * data}")
    if config.reconstruct and config.reconstruct_batch % data:
        raise BarberError(
            f"--mesh data={data}: {data} does not divide the {config.reconstruct_batch} samples of --reconstruct-batch"
        )


def headline(config: PruneConfig, checkpoint: Checkpoint, model: Model, devices: Devices) -> str:
    """The first line: devices, dtype, model size, samples."""
    device, count, available = devices.used[0], len(devices.used), jax.device_count()
    size = sum(checkpoint.size(name) for name in checkpoint.names()) / 1e6
    of = f" of {available}" if count < available else ""
    return (
        f"{count}{of} x {device.device_kind} ({device.platform}), {config.compute_dtype}; "
        f"{model.model_type} of {size:.1f} M parameters in {model.layers} blocks; "
        f"{config.samples} samples of {config.length} tokens"
    )


def prune(config: PruneConfig) -> dict:
    """Prune a checkpoint and write the result.

    Returns:
        the content of run.json.

    Raises:
        BarberError: a mistake of the user's; nothing is left under --out then.
    """
    began = time.perf_counter()
    reads = [config.ckpt, config.calibration, config.eval_text, config.masks, config.sparse_ckpt]
    if is_primary():
        check_destination(config.out, config.overwrite, [Path(given) for given in reads if given])
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    devices = Devices.of(parse_mesh(config.mesh))
    with Progress(model.layers, config.verbose, silent=not is_primary()) as progress:
        check(config, checkpoint, model, devices)
        start, config, sparsity = open_start(config, checkpoint, model, devices, progress)
        config = dataclasses.replace(config, batch=config.batch or passes.default_batch(config.length))
        owl, allotted = config.allocate == "owl", None
        ids = calibration(config, checkpoint, model) if start.needs_stream or config.changes or owl else None
        windows = evaluation_windows(config, checkpoint, model)
        identity = run_identity(config, checkpoint, ids)
        require_agreement("options or files", identity)
        with contextlib.ExitStack() as stack:
            state, writer = None, None
            if is_primary():
                pattern = str(config.sparsity_pattern)
                writer = FolderWriter(
                    config.out, checkpoint, model.pruned_names(), pattern, sparsity, config.save_start
                )
                stack.enter_context(writer)
                state = stack.enter_context(open_state(config, identity, model.layers, progress))
            progress.say(headline(config, checkpoint, model, devices))
            blocks, written = [], set()
            with devices.context():
                if owl:
                    allotted = allocation.sparsities(config, checkpoint, model, ids, devices, progress)
                    start.sparsities = allotted
                pruning = Pruning(checkpoint, model, ids, start, config, progress, devices, History(state))
                for result in pruning:
                    if writer:
                        for name, weight in result.weights.items():
                            if name not in result.masks:
                                writer.write(name, weight)
                                continue
                            writer.write_pruned(name, weight, result.masks[name])
                            if config.save_start:
                                writer.write_start_mask(name, result.start_masks[name])
                        written |= result.weights.keys()
                    blocks.append(result.record)
                    progress.done(result.record)
                    interrupt.check()
            quality = None
            if writer:
                writer.finish(written)
                if windows is not None:
                    source = str(config.eval_text or config.eval_dataset)
                    quality = {"source": source, **perplexity(HFFolder(writer.folder), model, windows, config.batch)}
            seconds = time.perf_counter() - began
            record = run_record(config, sparsity, model, devices.used, blocks, seconds, quality, allotted)
            if writer:
                writer.write_json(RUN, record)
                make_report(writer.folder, config.out, progress)
                apply_format(writer.folder, config.format)
                interrupt.check()
                writer.publish()
                state.remove()
        progress.say(summary(config, record))
    return record


def make_report(folder: Path, out: Path, progress: Progress) -> None:
    """Write report.html; a plot that cannot be drawn must not cost the run."""
    try:
        write_report(folder, out.name)
    except BarberError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        progress.say(f"no report.html ({reason}); python -m barber_jax.report {out} tries again")


@contextlib.contextmanager
def open_state(config: PruneConfig, identity: dict, layers: int, progress: Progress) -> Iterator[RunState]:
    """Where finished blocks are kept until the run is done; says, if it ends before, how to go on.

    Raises:
        BarberError: there is nothing to go on with, or something that must not be lost.
    """
    folder = beside(config.out, ".run")
    if config.resume:
        state = RunState.resume(folder, identity)
        if state.damaged is not None:
            progress.say(f"{folder}: block {state.damaged} is damaged; it and what came after it is computed again")
        progress.say(f"going on after {state.finished} of {layers} blocks")
    else:
        if not config.overwrite and RunState.holds_blocks(folder):
            raise BarberError(f"{folder} holds an unfinished run; --resume goes on with it, --overwrite starts anew")
        state = RunState.create(folder, identity)
    with state:
        try:
            yield state
        except BaseException as error:
            if state.finished and not isinstance(error, DamagedInput):
                kept = f"{state.finished} of {layers} blocks are kept in {folder}"
                progress.say(f"{kept}; the same command with --resume goes on from there")
            else:
                state.remove()
            raise


UNIMPORTANT = (
    *("ckpt", "out", "format", "masks", "sparse_ckpt", "calibration", "text_field", "seed", "offload_activations"),
    *("compilation_cache", "coordinator", "processes", "process", "overwrite", "resume", "verbose"),
    *("eval_text", "eval_dataset", "eval_windows"),
)
"""Options that change no figure, or only by what is read, whose content is compared instead."""


def run_identity(config: PruneConfig, checkpoint: Checkpoint, ids: np.ndarray | None) -> dict[str, Any]:
    """What must be the same for a run to go on: options that matter, and hashes of what is read."""
    options = dataclasses.asdict(config)
    identity = {f"--{name.replace('_', '-')}": options[name] for name in options if name not in UNIMPORTANT}
    # What they mean: a default that is spelled out the second time is the same run.
    identity |= {"--pattern": str(config.sparsity_pattern), "--sparsity": config.sparsity_pattern.sparsity}
    if config.reconstruct:
        # Its order of samples too comes from the seed.
        identity["--seed"] = config.seed
    for option, given in (("--ckpt", checkpoint), ("--sparse-ckpt", config.sparse_ckpt)):
        if given:
            sources = (open_checkpoint(given) if isinstance(given, str) else given).sources()
            for path in sources:
                identity[f"content of {option} {os.path.relpath(path, sources[0].parent)}"] = fingerprint(path)
    if config.masks:
        identity["content of --masks"] = fingerprint(config.masks.expanduser())
    if ids is not None:
        identity["content of the calibration ids"] = array_fingerprint(ids)
    return identity


def open_start(
    config: PruneConfig, checkpoint: Checkpoint, model: Model, devices: Devices, progress: Progress
) -> tuple[Start, PruneConfig, float]:
    """What gives the starting masks, the options with the pattern that they have, and the sparsity asked for."""
    masks = read_masks(config.masks.expanduser()) if config.masks else None
    if masks and config.pattern is None:
        config = dataclasses.replace(config, pattern=masks.pattern)
    if config.sparse_ckpt:
        sparse = open_checkpoint(config.sparse_ckpt)
        given = SparseCheckpointStart(sparse, checkpoint, model, config.sparsity_pattern, devices, masks)
        return given, config, masks.sparsity if masks else given.sparsity()
    if masks:
        return MaskFileStart(masks, checkpoint, model, config.sparsity_pattern, devices), config, masks.sparsity
    pattern = config.sparsity_pattern
    criterion = CRITERIA[config.method]
    return CriterionStart(criterion, model, config.samples, pattern, progress.say), config, pattern.sparsity


def calibration(config: PruneConfig, checkpoint: Checkpoint, model: Model) -> np.ndarray:
    """Calibration token ids, int32 [samples, length]."""
    return load_calibration(
        config.calibration,
        checkpoint.tokenizer,
        samples=config.samples,
        length=config.length,
        seed=config.seed,
        vocab_size=model.vocabulary,
        text_field=config.text_field,
    )


def evaluation_windows(config: PruneConfig, checkpoint: Checkpoint, model: Model) -> np.ndarray | None:
    """Windows of the text to evaluate on, int32 [windows, length], or None.

    Read before the hours of work, so that a text that cannot be read costs nothing.
    """
    if not (config.eval_text or config.eval_dataset):
        return None
    ids = evaluation_ids(checkpoint, path=config.eval_text, dataset=config.eval_dataset, text_field=config.text_field)
    source = str(config.eval_text or config.eval_dataset)
    return cut_windows(ids, config.length, config.eval_windows, source, model.vocabulary)


def summary(config: PruneConfig, record: dict) -> str:
    """The last line."""
    whole = totals(record["blocks"])
    parts = [f"{config.out}: sparsity {whole['sparsity']:.4f}"]
    if "swaps" in whole:
        parts.append(f"{whole['swaps']} swaps")
    if "loss_before" in whole:
        parts.append(f"block loss {whole['loss_before']:.4g} -> {whole['loss_after']:.4g}")
    if "perplexity" in record:
        parts.append(f"perplexity {record['perplexity']['perplexity']:.4f}")
    return ", ".join([*parts, f"{record['totals']['seconds']:.1f} s"])


def run(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(PruneConfig, "barber_jax.prune", arguments)
    set_precision()
    set_compilation_cache(config.compilation_cache)
    join(config.coordinator, config.processes, config.process)
    prune(config)


if __name__ == "__main__":
    exit_with_one_line(run)
