"""python -m barber_jax.prune: options -> run -> files."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.calibration import load_calibration
from barber_jax.command import parse, set_precision
from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RUN, FolderWriter, check_destination
from barber_jax.convert.formats import apply_format
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.mask_file import read_masks
from barber_jax.convert.parameters import check_tensors
from barber_jax.criteria import CRITERIA
from barber_jax.errors import BarberError, exit_with_one_line
from barber_jax.eval.perplexity import cut_windows, evaluation_ids, perplexity
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.progress import Progress
from barber_jax.report import run_record, totals
from barber_jax.starting import CriterionStart, MaskFileStart, SparseCheckpointStart, Start
from barber_jax.stream import prune_blocks


def check(config: PruneConfig, checkpoint: Checkpoint, model: Model) -> None:
    """Raise BarberError for what can be known to fail before any work is done."""
    check_tensors(checkpoint, model)
    if config.length > model.positions:
        raise BarberError(f"--length {config.length} is more than the model's {model.positions} positions")
    for name in model.kernel_names(0).values():
        config.sparsity_pattern.check_inputs(checkpoint.shape(name)[1], name)


def headline(config: PruneConfig, checkpoint: Checkpoint, model: Model) -> str:
    """The first line: device, dtype, model size, samples."""
    device = jax.devices()[0]
    size = sum(checkpoint.size(name) for name in checkpoint.names()) / 1e6
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), {config.compute_dtype}; "
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
    check_destination(config.out, config.overwrite, [Path(given) for given in reads if given])
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    with Progress(model.layers, config.verbose) as progress:
        check(config, checkpoint, model)
        start, config, sparsity = open_start(config, checkpoint, model, progress)
        ids = calibration(config, checkpoint, model) if start.needs_stream or config.rebuild else None
        windows = evaluation_windows(config, checkpoint, model)
        pattern = str(config.sparsity_pattern)
        with FolderWriter(config.out, checkpoint, model.pruned_names(), pattern, sparsity) as writer:
            progress.say(headline(config, checkpoint, model))
            blocks = []
            for result in prune_blocks(checkpoint, model, ids, start, config, progress):
                for name, mask in result.masks.items():
                    writer.write_pruned(name, result.weights[name], mask)
                blocks.append(result.record)
                progress.done(result.record)
            writer.finish(set(model.pruned_names()))
            quality = None
            if windows is not None:
                source = str(config.eval_text or config.eval_dataset)
                quality = {"source": source, **perplexity(HFFolder(writer.folder), model, windows, config.batch)}
            record = run_record(config, sparsity, model, blocks, time.perf_counter() - began, quality)
            writer.write_json(RUN, record)
            apply_format(writer.folder, config.format)
            writer.publish()
        progress.say(summary(config, record))
    return record


def open_start(
    config: PruneConfig, checkpoint: Checkpoint, model: Model, progress: Progress
) -> tuple[Start, PruneConfig, float]:
    """What gives the starting masks, the options with the pattern that they have, and the sparsity asked for."""
    if config.masks:
        masks = read_masks(config.masks.expanduser())
        if config.pattern is None:
            config = dataclasses.replace(config, pattern=masks.pattern)
        return MaskFileStart(masks, checkpoint, model, config.sparsity_pattern), config, masks.sparsity
    if config.sparse_ckpt:
        sparse = open_checkpoint(config.sparse_ckpt)
        given = SparseCheckpointStart(sparse, checkpoint, model, config.sparsity_pattern)
        return given, config, given.sparsity()
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
        parts.append(f"{whole['swaps']} swaps, block loss {whole['loss_before']:.4g} -> {whole['loss_after']:.4g}")
    if "perplexity" in record:
        parts.append(f"perplexity {record['perplexity']['perplexity']:.4f}")
    return ", ".join([*parts, f"{record['totals']['seconds']:.1f} s"])


def run(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(PruneConfig, "barber_jax.prune", arguments)
    set_precision()
    prune(config)


if __name__ == "__main__":
    exit_with_one_line(run)
