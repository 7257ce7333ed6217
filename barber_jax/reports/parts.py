"""Texts and key figures that the pages of a pruning run and of a recovery share."""

from collections.abc import Mapping
from typing import Any

from barber_jax.console.options import flag


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `up_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours, depending on their size."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def memory_figures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Peak memory as key figures, (value, label)."""
    memory = record["peak_memory"]
    known = [(key, where) for key, where in (("host_bytes", "host"), ("device_bytes", "device")) if key in memory]
    return [(f"{memory[key] / 2**30:.2f} GiB", f"peak {where} memory") for key, where in known]


def option_pairs(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options that are set, (flag, value)."""
    return [(flag(key), value) for key, value in options.items() if value not in (None, False)]


def device_pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The devices, as a pair of name and value."""
    device = record["device"]
    return [("devices", f"{device['count']} x {device['kind']} ({device['platform']})")]


def version_pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions of the libraries, (name, value)."""
    return [(f"{name} version", version) for name, version in record["versions"].items()]
