"""How close a pruning comes to what the hardware can do.

    python -m barber_jax.eval.benchmark --ckpt ... [options of barber_jax.prune] [--json FILE]

prunes for real and sets the operations that the method needs (see operations.py) against the seconds of every stage,
and against the highest rate of a matrix product measured just before and after on the model's own shapes.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from barber_jax import passes
from barber_jax.command import parse, set_compilation_cache, set_precision
from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import writing
from barber_jax.errors import BarberError, exit_with_one_line
from barber_jax.eval import operations
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


@dataclass(frozen=True)
class BenchmarkConfig:
    """Prune, and say how fast each stage was and how fast it could have been."""

    prune: tyro.conf.OmitArgPrefixes[PruneConfig]
    """What to prune; the result is written to --out."""
    json: Path | None = None
    """Also write the figures to this file."""


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


def benchmark(config: BenchmarkConfig) -> dict:
    """Prune and measure.

    Returns:
        `stages`: seconds, operations, flops (per second) and fraction of the peak of each; the same for the `whole`
        and for a block in the `steady` state (median of blocks 1 ..); `selection` as a share of the stages' seconds;
        `peak` by shape; `compilation`; `peak_memory`, `device`, `versions`, `options` as in run.json.
    """
    options = config.prune
    if options.mesh:
        raise BarberError("--mesh: a matrix product's peak is measured on one device; leave it out")
    model = build_model(open_checkpoint(options.ckpt).config, jnp.dtype(options.compute_dtype))
    tokens = options.length * (options.batch or passes.default_batch(options.length))
    dtype = jnp.dtype(options.compute_dtype)
    before = product_rates(model, tokens, dtype)
    watch = CompilationWatch()
    began = time.perf_counter()
    record = prune(options)
    seconds = time.perf_counter() - began
    compilation = watch.figures()
    after = product_rates(model, tokens, dtype)
    peaks = {shape: max(rate, after[shape]) for shape, rate in before.items()}
    peak = max(peaks.values())

    def rate(spent: float, needed: int) -> dict:
        flops = needed / spent if spent else 0.0
        return {"seconds": spent, "operations": needed, "flops": flops, "fraction_of_peak": flops / peak}

    needed = operations.of_run(model, options)
    spent = record["totals"]["seconds_per_stage"]
    blocks = [sum(block["seconds"].values()) for block in record["blocks"]]
    steady = statistics.median(blocks[1:] or blocks)
    return {
        "whole": rate(seconds, sum(needed.values())),
        "steady": rate(steady, sum(operations.of_block(model, options, last=False).values())),
        "stages": {stage: rate(time_, needed.get(stage, 0)) for stage, time_ in spent.items()},
        "swap_share": sum(time_ for stage, time_ in spent.items() if stage.endswith("swap")) / sum(spent.values()),
        "peak": {"flops": peak, "shapes": peaks},
        "compilation": compilation,
        **{key: record[key] for key in ("peak_memory", "device", "versions", "options")},
    }


def show(figures: dict) -> None:
    """Print a table."""
    table = Table("stage", "seconds", "GFLOP", "GFLOP/s", "of peak")
    for name, row in [*figures["stages"].items(), ("whole", figures["whole"]), ("steady block", figures["steady"])]:
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
    compilation, cache = figures["compilation"], figures["compilation"]["cache"]
    lines = [
        f"peak {figures['peak']['flops'] / 1e9:.1f} GFLOP/s: best matrix product of "
        + ", ".join(f"{shape} {rate / 1e9:.0f}" for shape, rate in figures["peak"]["shapes"].items()),
        f"swaps {figures['swap_share']:.1%} of the stages' seconds",
        f"compiling {sum(compilation['seconds'].values()):.2f} s ({compilation['programs']} programs; "
        f"cache: {cache['hits']} found, {cache['misses']} compiled)",
        f"peak memory {figures['peak_memory']['host_bytes'] / 1e9:.2f} GB",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def run(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(BenchmarkConfig, "barber_jax.eval.benchmark", arguments)
    set_precision()
    set_compilation_cache(config.prune.compilation_cache)
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
