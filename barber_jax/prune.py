"""Command `python -m barber_jax.prune`: prune a checkpoint, rebuild its mask and write the result."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.config import PruneConfig
from barber_jax.console import interrupt
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
from barber_jax.data.calibration import check_source, load_calibration
from barber_jax.data.windows import cut_windows, default_windows, evaluation_ids
from barber_jax.devices.hosts import join
from barber_jax.devices.mesh import Devices, is_primary, require_agreement
from barber_jax.devices.options import parse_mesh
from barber_jax.devices.settings import choose_selection, prepare_jax
from barber_jax.forward import passes
from barber_jax.forward.perplexity import perplexity
from barber_jax.masks.mask_file import read_masks
from barber_jax.masks.selection import Selection
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.reports.model_card import write_model_card
from barber_jax.reports.report_page import write_report
from barber_jax.reports.run_record import run_record
from barber_jax.reports.summary import headline, summary
from barber_jax.run.history import History
from barber_jax.run.loop import Pruning
from barber_jax.run.resume import open_state, run_identity


def prune(config: PruneConfig) -> dict:
    """Prune a checkpoint and write the result to `config.out`.

    Returns:
        The content of run.json.

    Raises:
        BarberError: an error that the user can fix; nothing is left under --out.
    """
    inputs = [config.ckpt, config.calibration, config.eval_text, config.masks, config.sparse_ckpt]
    paths = [Path(given) for given in inputs if given]
    with claimed(config.out, config.overwrite, paths) if is_primary() else contextlib.nullcontext():
        return _prune(config)


def _prune(config: PruneConfig) -> dict:
    """Do what `prune` does, with --out claimed."""
    start_time = time.perf_counter()
    checkpoint = open_checkpoint(config.ckpt)
    sparse = open_checkpoint(config.sparse_ckpt) if config.sparse_ckpt else None
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    devices = Devices.of(parse_mesh(config.mesh))
    selection = choose_selection(config.selection, devices.used[0].platform)
    with contextlib.ExitStack() as stack, jax.default_matmul_precision(config.matmul_precision):
        progress = stack.enter_context(Progress(config.verbose, silent=not is_primary()))
        check_inputs(config, checkpoint, model, devices)
        start, config, sparsity = open_start(config, checkpoint, sparse, model, devices, progress, selection)
        config = dataclasses.replace(config, batch=config.batch or passes.default_batch(config.length))
        owl = config.allocate == "owl"
        uses_ids = start.needs_stream or config.runs_stages or owl
        check_source(config.calibration)
        ids = calibration_ids(config, checkpoint, model, progress.say) if uses_ids else None
        windows = evaluation_windows(config, checkpoint, model, progress.say)
        identity = run_identity(config.as_dict(), checkpoint, sparse, ids)
        require_agreement("options or files", identity)
        state, writer = None, None
        if is_primary():
            names, pattern = model.pruned_names(), str(config.sparsity_pattern)
            writer = FolderWriter(config.out, checkpoint, names, pattern, sparsity, config.save_start)
            stack.enter_context(writer)
            switches = {"resume": config.resume, "overwrite": config.overwrite}
            run_folder = sibling_path(config.out, ".run")
            state = stack.enter_context(open_state(run_folder, identity, model.layers, progress.say, **switches))
            if writer.no_tokenizer:
                progress.say(writer.no_tokenizer)
        progress.say(headline(config.as_dict(), checkpoint, model, devices))
        dense = measure_perplexity(config, checkpoint, model, windows, progress, "dense model") if writer else None
        with devices.context():
            if owl:
                settings = {"batch": config.batch, "offload": config.offload_activations}
                arguments = (config, config.sparsity_pattern.sparsity, checkpoint, model, ids, devices, progress)
                start.sparsities = allocation.block_sparsities(*arguments, **settings)
            with progress.phase("pruning", model.layers) as phase:
                settings = {"offload": config.offload_activations, "keep_start": config.save_start}
                settings["selection"] = selection
                arguments = (checkpoint, model, ids, start, config, config.batch, phase, devices, History(state))
                blocks = write_blocks(Pruning(*arguments, **settings), writer, phase)
        pruned = None
        if writer:
            result = HFFolder(writer.folder)
            pruned = measure_perplexity(config, result, model, windows, progress, "pruned model")
        options, seconds = config.as_dict() | {"sparsity": sparsity}, time.perf_counter() - start_time
        options["selection"] = selection
        measured = {"dense_perplexity": dense, "perplexity": pruned}
        allocated = start.sparsities if owl else None
        record = run_record(options, model, devices.used, blocks, seconds, **measured, allocation=allocated)
        if writer:
            writer.write_json(RUN, record)
            write_model_card(writer.folder, config.out.name, record, config.command_line())
            try_report(writer.folder, config.out, progress)
            apply_format(writer.folder, config.format)
            interrupt.check()
            with interrupt.deferred():
                writer.publish()
                state.remove()
        progress.say(summary(record))
    return record


def check_inputs(config: PruneConfig, checkpoint: Checkpoint, model: Model, devices: Devices) -> None:
    """Raise `BarberError`, before the long computation, if the options do not fit the checkpoint or the devices."""
    check_tensors(checkpoint, model)
    model.check_length(config.length)
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
    criterion = CRITERIA[config.method]
    return CriterionStart(criterion, model, config.samples, pattern, progress.say, selection), config, pattern.sparsity


def calibration_ids(
    config: PruneConfig, checkpoint: Checkpoint, model: Model, say: Callable[[str], None]
) -> np.ndarray:
    """Load the calibration token ids, int32 [samples, length]; `say` prints a line."""
    return load_calibration(
        config.calibration,
        checkpoint.tokenizer,
        samples=config.samples,
        length=config.length,
        seed=config.seed,
        vocab_size=model.vocabulary,
        text_field=config.text_field,
        say=say,
    )


def evaluation_windows(
    config: PruneConfig, checkpoint: Checkpoint, model: Model, say: Callable[[str], None]
) -> np.ndarray | None:
    """Read the evaluation text as windows of token ids, int32 [windows, length]; None if none is given.

    This happens before pruning, so that a text that cannot be read is reported at once. `say` prints a line.
    """
    if not (config.eval_text or config.eval_dataset):
        return None
    source = {"path": config.eval_text, "dataset": config.eval_dataset, "text_field": config.text_field}
    needed = config.eval_windows and config.eval_windows * config.length
    ids = evaluation_ids(checkpoint.tokenizer, **source, needed=needed, say=say)
    name = str(config.eval_text or config.eval_dataset)
    return cut_windows(
        ids, config.length, config.eval_windows or default_windows(config.eval_dataset), name, model.vocabulary
    )


def measure_perplexity(
    config: PruneConfig,
    checkpoint: Checkpoint,
    model: Model,
    windows: np.ndarray | None,
    progress: Progress,
    name: str,
) -> dict | None:
    """Measure the perplexity of a checkpoint.

    Args:
        windows: int32 [windows, length]; None to measure nothing.
        name: of the checkpoint, for the progress line.

    Returns:
        `source`, the name of the evaluation text, and what `perplexity` returns; None without windows.
    """
    if windows is None:
        return None
    with progress.phase(f"perplexity of the {name}", model.layers, announce=True) as phase:
        measured = perplexity(checkpoint, model, windows, config.batch, phase=phase)
    return {"source": str(config.eval_text or config.eval_dataset), **measured}


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


def try_report(folder: Path, out: Path, progress: Progress) -> None:
    """Write report.html. If a plot cannot be drawn, only print a line, so that the run's result is not lost.

    Args:
        folder: output folder.
        out: its final name.

    Raises:
        BarberError: the report cannot be written to disk.
    """
    try:
        write_report(folder, out.name)
    except BarberError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        progress.say(f"report.html could not be written ({reason}); to retry, run python -m barber_jax.report {out}")


def run(arguments: list[str] | None = None) -> None:
    """Run the command with command-line arguments (default sys.argv)."""
    config = PruneConfig.parse("barber_jax.prune", arguments)
    prepare_jax(config.compilation_cache, config.matmul_precision)
    join(config.coordinator, config.processes, config.process, config.public_coordinator)
    prune(config)


if __name__ == "__main__":
    exit_with_one_line(run)
