"""Compose the first and the last line that a pruning run and a recovery print."""

from collections.abc import Mapping
from typing import Any

import jax

from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.models.family import Model


def headline(options: Mapping[str, Any], checkpoint: Checkpoint, model: Model, devices: Devices) -> str:
    """Compose the first line: devices, compute dtype, model size, calibration samples."""
    device, count, available = devices.used[0], len(devices.used), jax.device_count()
    size = sum(checkpoint.size(name) for name in checkpoint.names()) / 1e6
    of = f" of {available}" if count < available else ""
    return (
        f"{count}{of} x {device.device_kind} ({device.platform}), {options['compute_dtype']}; "
        f"{model.model_type} with {size:.1f} M parameters in {model.layers} blocks; "
        f"{options['samples']} samples of {options['length']} tokens"
    )


def summary(record: Mapping[str, Any]) -> str:
    """Compose the last line from the content of run.json: sparsity, swaps, losses, perplexity, seconds."""
    totals = record["totals"]
    parts = [f"{record['options']['out']}: sparsity {totals['sparsity']:.4f}"]
    if "swaps" in totals:
        parts.append(f"{totals['swaps']} swaps")
    if "loss_before" in totals:
        parts.append(f"block loss {totals['loss_before']:.4g} -> {totals['loss_after']:.4g}")
    if "perplexity" in record:
        measured = f"{record['perplexity']['perplexity']:.4f}"
        if "dense_perplexity" in record:
            measured = f"dense {record['dense_perplexity']['perplexity']:.4f}, pruned {measured}"
        parts.append(f"perplexity {measured}")
    return ", ".join([*parts, f"{totals['seconds']:.1f} s"])


def recover_headline(options: Mapping[str, Any], model: Model, devices: Devices, sparsity: str, tokens: int) -> str:
    """Compose the first line of a recovery: devices, dtype, what is trained on what.

    Args:
        options: options of the run by name.
        sparsity: and pattern, as text.
        tokens: of the text to train on.
    """
    device = devices.used[0]
    return (
        f"{len(devices.used)} x {device.device_kind} ({device.platform}), {options['compute_dtype']}; "
        f"{model.model_type} in {model.layers} blocks, sparsity {sparsity}; "
        f"{options['steps']} steps of {options['batch']} x {options['length']} tokens, of a text of {tokens} tokens"
    )


def recover_summary(record: Mapping[str, Any]) -> str:
    """Compose the last line of a recovery from the content of recover.json: held-out loss, perplexities, seconds."""
    losses = {each["step"]: each["loss"] for each in record["evaluations"]}
    written = record["best_step"] if record["written"] == "best" else max(losses)
    change = f"held-out loss {losses[0]:.4f} -> {losses[written]:.4f}"
    parts = [f"{record['options']['out']}: {change} at step {written} ({record['written']})"]
    names = {"dense": "dense_perplexity", "pruned": "start_perplexity", "recovered": "perplexity"}
    measured = [f"{name} {record[key]['perplexity']:.4f}" for name, key in names.items() if record[key]]
    if measured:
        parts.append(f"perplexity {', '.join(measured)}")
    return ", ".join([*parts, f"{record['tokens_per_second']:.0f} tokens/s", f"{record['seconds']:.1f} s"])
