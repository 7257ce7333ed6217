"""python -m barber_jax.prune: options -> run -> files."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from barber_jax.calibration import load_calibration
from barber_jax.command import parse, set_precision
from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import RUN, FolderWriter, check_destination
from barber_jax.convert.hf_folder import HFFolder
from barber_jax.convert.parameters import check_tensors
from barber_jax.errors import BarberError, exit_with_one_line
from barber_jax.eval.perplexity import cut_windows, evaluation_ids, perplexity
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.progress import Progress
from barber_jax.report import run_record, totals
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
    reads = [Path(config.ckpt), Path(config.calibration), *([config.eval_text] if config.eval_text else [])]
    check_destination(config.out, config.overwrite, reads)
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    check(config, checkpoint, model)
    ids = load_calibration(
        config.calibration,
        checkpoint.tokenizer,
        samples=config.samples,
        length=config.length,
        seed=config.seed,
        vocab_size=model.vocabulary,
        text_field=config.text_field,
    )
    windows = None
    if config.eval_text or config.eval_dataset:
        # Before the hours of work, so that a text that cannot be read costs nothing.
        source = str(config.eval_text or config.eval_dataset)
        text = evaluation_ids(
            checkpoint, path=config.eval_text, dataset=config.eval_dataset, text_field=config.text_field
        )
        windows = cut_windows(text, config.length, config.eval_windows, source, model.vocabulary)
    pruned = [name for index in range(model.layers) for name in model.kernel_names(index).values()]
    pattern = config.sparsity_pattern
    with (
        FolderWriter(config.out, checkpoint, pruned, str(pattern), pattern.sparsity) as writer,
        Progress(model.layers, config.verbose) as progress,
    ):
        progress.say(headline(config, checkpoint, model))
        blocks = []
        for result in prune_blocks(checkpoint, model, ids, config, progress):
            for name, mask in result.masks.items():
                writer.write_pruned(name, result.weights[name], mask)
            blocks.append(result.record)
            progress.done(result.record)
        writer.finish(set(pruned))
        quality = None
        if windows is not None:
            quality = {"source": source, **perplexity(HFFolder(writer.folder), model, windows, config.batch)}
        record = run_record(config, model, blocks, time.perf_counter() - began, quality)
        writer.write_json(RUN, record)
        writer.publish()
        progress.say(summary(config, record))
    return record


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
