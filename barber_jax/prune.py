"""Command `python -m barber_jax.prune`: prune a checkpoint, rebuild its mask and write the result."""

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.config import PruneConfig
from barber_jax.console import interrupt
from barber_jax.console.callable_module import make_callable
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import expand
from barber_jax.console.progress import Progress
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RUN, FolderWriter, claimed, sibling_path
from barber_jax.convert.formats import apply_format
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.parameters import check_tensors
from barber_jax.criteria import CRITERIA, allocation
from barber_jax.criteria.starting import CriterionStart, MaskFileStart, SparseCheckpointStart, Start
from barber_jax.data.begin import settled
from barber_jax.data.calibration import check_source, split_source
from barber_jax.devices.hosts import join
from barber_jax.devices.mesh import Devices, is_primary, require_agreement
from barber_jax.devices.options import parse_mesh
from barber_jax.devices.settings import choose_selection, prepare_jax
from barber_jax.forward import passes
from barber_jax.forward.evaluation import evaluation_windows, measure_perplexity
from barber_jax.masks.mask_file import read_masks
from barber_jax.masks.selection import Selection
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.reports.model_card import write_model_card
from barber_jax.reports.page import try_writing
from barber_jax.reports.report_page import write_report
from barber_jax.reports.run_record import run_record
from barber_jax.reports.summary import headline, summary
from barber_jax.run.calibration import Calibration, open_calibration
from barber_jax.run.dense_gradients import Sweeps
from barber_jax.run.history import History
from barber_jax.run.loop import Pruning
from barber_jax.run.resume import open_state, run_identity
from barber_jax.run.run_state import RunState


def prune(config: PruneConfig) -> dict:
    """Prune a checkpoint and write the result to `config.out`.

    Returns:
        The content of run.json.

    Raises:
        BarberError: an error that the user can fix; nothing is left under --out.
    """
    text = split_source(config.calibration)[1]
    inputs = [config.ckpt, text, config.eval_text, config.masks, config.sparse_ckpt]
    paths = [Path(given) for given in inputs if given]
    with claimed(config.out, config.overwrite, paths) if is_primary() else contextlib.nullcontext():
        return _prune(config)


@dataclass
class Prepared:
    """All that a run needs, read and checked before the long computation.

    Attributes:
        config: options, with what depends on the inputs filled in.
        checkpoint, model: to prune.
        devices: to compute on.
        selection: implementation of the selection of weights.
        start: source of the starting masks.
        sparsity: fraction of the prunable weights.
        calibration: the calibration tokens; None where none are needed.
        windows: int32 [windows, length] evaluation tokens; None to evaluate nothing.
        identity: what must be the same for the run to be resumed.
    """

    config: PruneConfig
    checkpoint: Checkpoint
    model: Model
    devices: Devices
    selection: Selection
    start: Start
    sparsity: float
    calibration: Calibration | None
    windows: np.ndarray | None
    identity: dict[str, Any]

    @property
    def ids(self) -> np.ndarray | None:
        """int32 [samples, length] calibration tokens; None where none are needed."""
        return self.calibration.ids if self.calibration else None


def _prune(config: PruneConfig) -> dict:
    """Do what `prune` does, with --out claimed."""
    start_time = time.perf_counter()
    with contextlib.ExitStack() as stack, jax.default_matmul_precision(config.matmul_precision):
        progress = stack.enter_context(Progress(config.verbose, silent=not is_primary()))
        run = prepare(config, progress)
        writer, state = open_output(run, stack, progress) if is_primary() else (None, None)
        progress.say(headline(run.config.as_dict(), run.checkpoint, run.model, run.devices))
        measure = partial(measure_perplexity, run.config, run.model, run.windows, progress)
        dense = measure(run.checkpoint, "dense model", run.config.batch) if writer else None
        blocks = prune_blocks(run, writer, state, progress)
        pruned = measure(HFFolder(writer.folder), "pruned model", run.config.batch) if writer else None
        options = run.config.as_dict() | {"sparsity": run.sparsity, "selection": run.selection}
        measured = {"dense_perplexity": dense, "perplexity": pruned}
        allocated = run.start.sparsities if run.config.allocate != "uniform" else None
        seconds = time.perf_counter() - start_time
        extra = {"allocation": allocated, "written_calibration": run.calibration and run.calibration.written}
        record = run_record(options, run.model, run.devices.used, blocks, seconds, **measured, **extra)
        if writer:
            publish(run.config, record, writer, state, progress)
        progress.say(summary(record))
    return record


def prepare(config: PruneConfig, progress: Progress) -> Prepared:
    """Open and check the inputs. Raises `BarberError`."""
    checkpoint = open_checkpoint(config.ckpt)
    sparse = open_checkpoint(config.sparse_ckpt) if config.sparse_ckpt else None
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    devices = Devices.of(parse_mesh(config.mesh))
    selection = choose_selection(config.selection, devices.used[0].platform)
    check_inputs(config, checkpoint, model, devices)
    start, config, sparsity = open_start(config, checkpoint, sparse, model, devices, progress, selection)
    batch, begin = config.batch or passes.default_batch(config.length), settled(config.begin_token, model.begins)
    config = dataclasses.replace(config, batch=batch, begin_token=begin)
    text = split_source(config.calibration)[1]
    if text is not None:
        check_source(text)
    windows = evaluation_windows(config, checkpoint, model, progress.say)
    uses_ids = start.needs_stream or config.runs_stages or config.allocate == "owl"
    calibration = open_calibration(config, checkpoint, model, devices, progress) if uses_ids else None
    identity = run_identity(config.as_dict(), checkpoint, sparse, calibration and calibration.ids)
    require_agreement("options or files", identity)
    return Prepared(config, checkpoint, model, devices, selection, start, sparsity, calibration, windows, identity)


def open_output(run: Prepared, stack: contextlib.ExitStack, progress: Progress) -> tuple[FolderWriter, RunState]:
    """Open the output folder and the run state, which `stack` closes. Raises `BarberError`."""
    config, model = run.config, run.model
    names, pattern = model.pruned_names(), str(config.sparsity_pattern)
    writer = FolderWriter(config.out, run.checkpoint, names, pattern, run.sparsity, config.save_start)
    stack.enter_context(writer)
    switches = {"resume": config.resume, "overwrite": config.overwrite}
    if run.calibration and run.calibration.written:
        run.calibration.save(writer.folder)
        switches["calibration"] = run.calibration.block()
    folder = sibling_path(config.out, ".run")
    state = stack.enter_context(open_state(folder, run.identity, model.layers, progress.say, **switches))
    if writer.no_tokenizer:
        progress.say(writer.no_tokenizer)
    return writer, state


def prune_blocks(run: Prepared, writer: FolderWriter | None, state: RunState | None, progress: Progress) -> list[dict]:
    """Prune all blocks; return their entries in run.json.

    Args:
        writer, state: None on processes other than the primary one.
    """
    config, offload = run.config, run.config.offload_activations
    inputs = (run.checkpoint, run.model, run.ids)
    sweeps = Sweeps(
        run.checkpoint,
        run.model,
        None if run.ids is None else passes.micro_batches(run.ids, config.batch, run.devices.shape[0]),
        run.devices,
        progress,
        state and state.folder,
        offload,
    )
    with run.devices.context():
        if config.allocate != "uniform":
            arguments = (config, config.sparsity_pattern.sparsity, *inputs, run.devices, progress)
            run.start.sparsities = allocation.block_sparsities(*arguments, batch=config.batch, offload=offload)
        if isinstance(run.start, CriterionStart) and run.start.needs_gradients:
            run.start.gradients = sweeps.weight_norms(run.start.needs_gradients)
        token_weights = sweeps.token_weights(config.seed) if config.needs_token_weights else None
        with progress.phase("pruning", run.model.layers) as phase:
            arguments = (*inputs, run.start, config, config.batch, phase, run.devices, History(state))
            switches = {"offload": offload, "keep_start": config.save_start, "selection": run.selection}
            switches["token_weights"] = token_weights
            return write_blocks(Pruning(*arguments, **switches), writer, phase)


def publish(config: PruneConfig, record: dict, writer: FolderWriter, state: RunState, progress: Progress) -> None:
    """Complete the output folder with everything about the run, give it its final name, and delete the run state."""
    writer.write_json(RUN, record)
    write_model_card(writer.folder, config.out.name, record, config.command_line())
    try_writing(lambda: write_report(writer.folder, config.out.name), config.out, progress.say)
    apply_format(writer.folder, config.format)
    interrupt.check()
    with interrupt.deferred():
        writer.publish()
        state.remove()


def check_inputs(config: PruneConfig, checkpoint: Checkpoint, model: Model, devices: Devices) -> None:
    """Raise `BarberError`, before the long computation, if the options do not fit the checkpoint or the devices."""
    check_tensors(checkpoint, model)
    model.check_length(config.length)
    allocation.check(config, config.sparsity_pattern.sparsity, model.layers)
    for name in model.kernel_names(0).values():
        config.sparsity_pattern.check_inputs(checkpoint.shape(name)[1], name)
    devices.check(model.block(), config.samples)
    data = devices.shape[0]
    if config.validates and config.samples < 2 * data:
        raise BarberError(
            f"--samples {config.samples}: with held-out samples --mesh data={data} needs at least {2 * data}"
        )
    if config.reconstruct and config.reconstruct_batch % data:
        raise BarberError(
            f"--mesh data={data}: {data} does not divide the {config.reconstruct_batch} samples of --reconstruct-batch"
        )


def open_start(
    config: PruneConfig,
    checkpoint: Checkpoint,
    sparse: Checkpoint | None,
    model: Model,
    devices: Devices,
    progress: Progress,
    selection: Selection,
) -> tuple[Start, PruneConfig, float]:
    """Open the source of the starting masks: a criterion, a mask file or a pruned checkpoint.

    Returns:
        The source, the options with the pattern of the mask file filled in, and the overall sparsity.
    """
    masks = read_masks(expand(config.masks)) if config.masks else None
    if masks and config.pattern is None:
        config = dataclasses.replace(config, pattern=masks.pattern)
    if sparse:
        start = SparseCheckpointStart(sparse, checkpoint, model, config.sparsity_pattern, devices, masks)
        return start, config, masks.sparsity if masks else start.sparsity()
    if masks:
        return MaskFileStart(masks, checkpoint, model, config.sparsity_pattern, devices), config, masks.sparsity
    pattern = config.sparsity_pattern
    criterion = CRITERIA[config.method].configured(config)
    return CriterionStart(criterion, model, config.samples, pattern, progress.say, selection), config, pattern.sparsity


def write_blocks(pruning: Pruning, writer: FolderWriter | None, phase) -> list[dict]:
    """Prune the blocks one after the other and write each when it is done; return their entries in run.json.

    Args:
        writer: writes the result; None on processes other than the primary one.
        phase: shows the progress.
    """
    blocks, written = [], set()
    for result in pruning:
        if writer:
            for name, weight in result.weights.items():
                if name in result.masks:
                    writer.write_pruned(name, weight, result.masks[name])
                else:
                    writer.write(name, weight)
            if pruning.keep_start:
                for name, mask in result.start_masks.items():
                    writer.write_start_mask(name, mask)
            written |= result.weights.keys()
        blocks.append(result.record)
        phase.block_pruned(result.record)
        interrupt.check()
    if writer:
        writer.finish(written)
    return blocks


def run(arguments: list[str] | None = None) -> None:
    """Run the command with command-line arguments (default sys.argv)."""
    config = PruneConfig.parse("barber_jax.prune", arguments)
    prepare_jax(config.compilation_cache, config.matmul_precision)
    join(config.coordinator, config.processes, config.process, config.public_coordinator)
    prune(config)


make_callable(__name__, prune)

if __name__ == "__main__":
    exit_with_one_line(run)
