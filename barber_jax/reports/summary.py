"""Compose the first and the last line that a pruning run prints."""

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
