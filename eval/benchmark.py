"""How close a pruning comes to what the hardware can do.

    python -m barber_jax.eval.benchmark --ckpt ... [options of barber_jax.prune] [--json FILE]

prunes for real and sets the operations that the method needs (see operations.py) against the seconds of every stage,
and against the highest rate of a matrix product measured just before and after on the model's own shapes. What is
compiled is compiled in the first block, so the stages' seconds hold that too; a block in the steady state does not.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from barber_jax.config import FileOptions, PruneConfig
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.console.options import OptionGroup
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.settings import set_compilation_cache, set_precision
from barber_jax.eval import operations
from barber_jax.forward import passes
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.prune import prune

REPEATS = 7
COMPILING = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    # With a program found in the cache this is the time to load it.
    "compile": "/jax/core/compile/backend_compile_duration",
}


UNFIT = {
    "mesh": "a matrix product's peak is measured on one device",
    "resume": "what an earlier process did cannot be timed",
    "coordinator": "a matrix product's peak is measured in one process",
    "eval_text": "evaluating is no part of what is timed",
    "eval_dataset": "evaluating is no part of what is timed",
}
"""Options of a pruning that would make a figure mean something else, and why."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(OptionGroup):
    """What is measured, and where it is written."""

    json: Path | None = None
    """Also write the figures to this file."""
    repeat: int = 1
    """Prune this many times; the figures are the fastest run's. All but the first find the programs compiled."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkFileOptions(FileOptions):
    """What is written."""

    out: Path | None = None
    """Folder to write, as prune does. Default: a temporary one, deleted afterwards."""


@dataclass(frozen=True, kw_only=True, init=False)
class BenchmarkConfig(MeasureOptions, BenchmarkFileOptions, PruneConfig):
    """Prune, and say how fast each stage was and how fast it could have been."""

    GROUPS: ClassVar = {"measure": MeasureOptions, **PruneConfig.GROUPS, "files": BenchmarkFileOptions}

    def settle(self) -> None:
        PruneConfig.settle(self)
        if self.repeat < 1:
            raise BarberError(f"--repeat {self.repeat} must be at least 1")
        for option, why in UNFIT.items():
            if getattr(self, option):
                raise BarberError(f"--{option.replace('_', '-')}: {why}; leave it out")

    def pruning(self, out: Path, again: bool) -> PruneConfig:
        """What to ask of prune, with its result in `out`; `again`: an earlier one's may be replaced there."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(PruneConfig)}
        return PruneConfig(**{**options, "out": out, "overwrite": self.overwrite or again})


class CompilationWatch:
    """Counts compilations, and the seconds that they take, from when it is made."""

    def __init__(self):
        self.seconds = dict.fromkeys(COMPILING, 0.0)
        self.programs = 0
        self.cache = {"hits": 0, "misses": 0}
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, seconds: float, **_) -> None:
        for name, known in COMPILING.items():
            if event == known:
                self.seconds[name] += seconds
                self.programs += name == "compile"

    def _event(self, event: str, **_) -> None:
        for kind in self.cache:
            self.cache[kind] += event == f"/jax/compilation_cache/cache_{kind}"

    def figures(self) -> dict:
        """What was counted so far."""
        return {"programs": self.programs, "cache": dict(self.cache), "seconds": dict(self.seconds)}


def product_rates(model: Model, tokens: int, dtype: jnp.dtype) -> dict[str, float]:
    """Operations per second of X W for each distinct kernel shape, best of `REPEATS`; X is [tokens, in]."""
    product = jax.jit(jnp.matmul)
    rates = {}
    shapes = dict(model.block().shapes)
    for shape in sorted({shapes[path] for sub in model.sub_blocks for path in sub.kernels}):
        x, weight = jnp.ones((tokens, shape[0]), dtype), jnp.ones(shape, dtype)
        jax.block_until_ready(product(x, weight))
        best = float("inf")
        for _ in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(product(x, weight))
            best = min(best, time.perf_counter() - began)
        rates[f"{tokens}x{shape[0]}x{shape[1]}"] = 2 * tokens * shape[0] * shape[1] / best
    return rates


def micro_batch_tokens(config: PruneConfig) -> int:
    """Tokens of one micro-batch, as the calibration samples are really split."""
    samples = np.empty((config.samples, 1), np.int32)
    return config.length * passes.micro_batches(samples, config.batch or passes.default_batch(config.length)).shape[1]


def prune_repeatedly(config: BenchmarkConfig) -> tuple[list[dict], list[float]]:
    """The run record and the wall seconds of each pruning."""
    records, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="barber_jax_benchmark_") as temporary:
        out = config.out or Path(temporary) / "out"
        for again in range(config.repeat):
            options = config.pruning(out, again > 0)
            began = time.perf_counter()
            records.append(prune(options))
            seconds.append(time.perf_counter() - began)
    return records, seconds


def steady_block(
    model: Model, config: PruneConfig, blocks: list[dict], rate: Callable[[float, int], dict]
) -> dict | None:
    """Seconds, operations, `swap_share` of a block that finds its programs compiled: medians over blocks of run.json.

    The first block compiles; the last does not propagate stream A and is taken only if there is no other. None for a
    model of one block.
    """
    alike = blocks[1:-1] or blocks[1:]
    if not alike:
        return None
    spent = [sum(block["seconds"].values()) for block in alike]
    swaps = [swap_share(block["seconds"]) for block in alike]
    needed = sum(operations.of_block(model, config, last=len(blocks) == 2).values())
    return {**rate(statistics.median(spent), needed), "swap_share": statistics.median(swaps)}


def swap_share(seconds: dict[str, float]) -> float:
    """Share of the stages' seconds that is swaps. Selecting the starting mask is not told apart inside "start"."""
    return sum(spent for stage, spent in seconds.items() if stage.endswith("swap")) / sum(seconds.values())


def benchmark(config: BenchmarkConfig) -> dict:
    """Prune and measure.

    Returns:
        `stages`: seconds, operations, flops (per second) and fraction of the peak of each, all blocks of the fastest
        pruning together; the same for it as a `whole` and for a block in the `steady` state (`steady_block`);
        `wall_seconds` of every pruning; `swap_share`: of the stages' seconds, compiling included; `peak`, also by
        shape; `compilation` of all prunings; `peak_memory` (of the process until the end of the first pruning),
        `device`, `versions`, `options` as in run.json.
    """
    model = build_model(open_checkpoint(config.ckpt).config, jnp.dtype(config.compute_dtype))
    tokens, dtype = micro_batch_tokens(config), jnp.dtype(config.compute_dtype)
    before = product_rates(model, tokens, dtype)
    watch = CompilationWatch()
    records, seconds = prune_repeatedly(config)
    compilation = watch.figures()
    after = product_rates(model, tokens, dtype)
    peaks = {shape: max(rate, after[shape]) for shape, rate in before.items()}
    peak = max(peaks.values())

    def rate(spent: float, needed: int) -> dict:
        flops = needed / spent if spent else 0.0
        return {"seconds": spent, "operations": needed, "flops": flops, "fraction_of_peak": flops / peak}

    best = records[seconds.index(min(seconds))]
    needed = operations.of_run(model, config)
    spent = best["totals"]["seconds_per_stage"]
    return {
        "whole": rate(min(seconds), sum(needed.values())),
        "wall_seconds": seconds,
        "steady": steady_block(model, config, best["blocks"], rate),
        "stages": {stage: rate(time_, needed.get(stage, 0)) for stage, time_ in spent.items()},
        "swap_share": swap_share(spent),
        "peak": {"flops": peak, "shapes": peaks},
        "compilation": compilation,
        **{key: records[0][key] for key in ("peak_memory", "device", "versions", "options")},
    }


def show(figures: dict) -> None:
    """Print a table."""
    table = Table("stage", "seconds", "GFLOP", "GFLOP/s", "of peak")
    steady = figures["steady"]
    rows = [*figures["stages"].items(), ("whole", figures["whole"]), *([("steady block", steady)] if steady else [])]
    for name, row in rows:
        counted = row["operations"] > 0
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['operations'] / 1e9:.1f}" if counted else "",
            f"{row['flops'] / 1e9:.1f}" if counted else "",
            f"{row['fraction_of_peak']:.1%}" if counted else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    compilation, cache, wall = figures["compilation"], figures["compilation"]["cache"], figures["wall_seconds"]
    memory, device = figures["peak_memory"], figures["device"]
    lines = [
        f"peak {figures['peak']['flops'] / 1e9:.1f} GFLOP/s: best matrix product of "
        + ", ".join(f"{shape} {rate / 1e9:.0f}" for shape, rate in figures["peak"]["shapes"].items()),
        f"swaps {figures['swap_share']:.1%} of the stages' seconds"
        + (f", {steady['swap_share']:.1%} of a steady block's" if steady else ""),
        f"wall seconds of each pruning: {', '.join(f'{spent:.2f}' for spent in wall)} (best {min(wall):.2f})",
        f"compiling {sum(compilation['seconds'].values()):.2f} s ({compilation['programs']} programs; "
        f"cache: {cache['hits']} found, {cache['misses']} compiled)",
        f"peak memory {memory['host_bytes'] / 1e9:.2f} GB"
        + (f", on the device {memory['device_bytes'] / 1e9:.2f} GB" if "device_bytes" in memory else ""),
        f"{device['kind']} ({device['platform']}), jax {figures['versions']['jax']}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def run(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = BenchmarkConfig.parse("barber_jax.eval.benchmark", arguments)
    set_precision()
    set_compilation_cache(config.compilation_cache)
    if config.json is not None and (config.json.is_dir() or not config.json.parent.is_dir()):
        # Before the work, not after it.
        raise BarberError(f"--json {config.json} is a folder or lies in none; name a file in a folder that exists")
    figures = benchmark(config)
    show(figures)
    if config.json is not None:
        with writing(config.json):
            config.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with_one_line(run)
