"""Measure the speed of a pruning run as a fraction of the device's peak matrix-product rate.

    python -m barber_jax.eval.benchmark --ckpt ... [options of barber_jax.prune] [--json FILE]

prunes the checkpoint and divides the operations that the method needs (operations.py) by the seconds of each stage. The
peak is the highest rate of a matrix product of the model's own shapes, measured just before and just after the pruning.
All programs are compiled in the first block, so the stages' seconds include compilation; those of the steady block do
not.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from barber_jax.config import FileOptions, PruneConfig
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.options import OptionGroup, flag
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.console.terminal import FILE_WIDTH, plain_console
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.devices.peak import matmul_rates
from barber_jax.devices.settings import prepare_jax
from barber_jax.eval import operations
from barber_jax.forward import passes
from barber_jax.models import build_model
from barber_jax.models.family import Model
from barber_jax.prune import prune
from barber_jax.stages import held_out_samples

COMPILATION_EVENTS = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    # For a program found in the cache, the time to load it.
    "compile": "/jax/core/compile/backend_compile_duration",
}
"""Phase of compilation -> the duration event by which JAX reports it."""


UNSUPPORTED_OPTIONS = {
    "mesh": "the peak of matrix products is measured on one device",
    "resume": "the work of an earlier process cannot be timed",
    "coordinator": "the peak of matrix products is measured in one process",
    "eval_text": "evaluation is not part of what is timed",
    "eval_dataset": "evaluation is not part of what is timed",
}
"""Options of barber_jax.prune that would make the measurements meaningless -> the reason."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(OptionGroup):
    """Repetitions, and the file for the results."""

    json: Path | None = None
    """Also write the results to this file."""
    repeat: int = 1
    """Prune this many times and report the fastest run. Only the first has to compile its programs."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkFileOptions(FileOptions):
    """Output files."""

    out: Path | None = None
    """Folder to write the pruned checkpoint to. Default: a temporary folder, deleted afterwards."""


@dataclass(frozen=True, kw_only=True, init=False)
class BenchmarkConfig(MeasureOptions, BenchmarkFileOptions, PruneConfig):
    """Prune, and report the speed of each stage as a fraction of the device's peak."""

    GROUPS: ClassVar = {"measure": MeasureOptions, **PruneConfig.GROUPS, "files": BenchmarkFileOptions}
    # Not the generated one of a group, which knows that group's options alone.
    __init__ = PruneConfig.__init__

    def settle(self) -> None:
        PruneConfig.settle(self)
        if self.repeat < 1:
            raise BarberError(f"--repeat {self.repeat} must be at least 1")
        for option, reason in UNSUPPORTED_OPTIONS.items():
            if getattr(self, option):
                raise BarberError(f"{flag(option)}: {reason}; leave it out")

    def prune_config(self, out: Path, overwrite: bool) -> PruneConfig:
        """Options for one pruning that writes to `out`; `overwrite`: replace an existing result there."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(PruneConfig)}
        return PruneConfig(**{**options, "out": out, "overwrite": self.overwrite or overwrite})


class CompilationWatch:
    """Counts the programs compiled since its creation, the seconds that they took, and cache hits and misses."""

    def __init__(self):
        self.seconds = dict.fromkeys(COMPILATION_EVENTS, 0.0)
        self.programs = 0
        self.cache = {"hits": 0, "misses": 0}
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, seconds: float, **_) -> None:
        for phase, known in COMPILATION_EVENTS.items():
            if event == known:
                self.seconds[phase] += seconds
                self.programs += phase == "compile"

    def _event(self, event: str, **_) -> None:
        for kind in self.cache:
            self.cache[kind] += event == f"/jax/compilation_cache/cache_{kind}"

    def figures(self) -> dict:
        """Programs, cache hits and misses, and seconds of each phase so far."""
        return {"programs": self.programs, "cache": dict(self.cache), "seconds": dict(self.seconds)}


def micro_batch_tokens(config: PruneConfig) -> int:
    """Tokens in one micro-batch of the pruning: its number of samples divides --samples and is at most --batch."""
    samples, batch = np.empty((config.samples, 1), np.int32), config.batch or passes.default_batch(config.length)
    held_out = held_out_samples(config, config.samples, 1)
    return config.length * passes.micro_batches(samples, batch, held_out=held_out).shape[1]


def prune_repeatedly(config: BenchmarkConfig) -> tuple[list[dict], list[float]]:
    """Prune `config.repeat` times; the run record (content of run.json) and the wall-clock seconds of each."""
    records, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="barber_jax_benchmark_") as temporary:
        out = config.out or Path(temporary) / "out"
        for repetition in range(config.repeat):
            options = config.prune_config(out, overwrite=repetition > 0)
            start = time.perf_counter()
            records.append(prune(options))
            seconds.append(time.perf_counter() - start)
    return records, seconds


def steady_block(
    model: Model, config: PruneConfig, blocks: list[dict], rate: Callable[[float, int], dict]
) -> dict | None:
    """Median speed and median `swap_share` of the blocks that run without compiling; None for a model of one block.

    The first block is left out because it compiles, the last because it does not propagate stream A (in a model of two
    blocks the last one is used).

    Args:
        blocks: the list `blocks` of run.json.
        rate: turns seconds and operations into the entries of the result.
    """
    steady_blocks = blocks[1:-1] or blocks[1:]
    if not steady_blocks:
        return None
    seconds = [sum(block["seconds"].values()) for block in steady_blocks]
    swaps = [swap_share(block["seconds"]) for block in steady_blocks]
    needed = sum(operations.block_operations(model, config, last=len(blocks) == 2).values())
    return {**rate(statistics.median(seconds), needed), "swap_share": statistics.median(swaps)}


def swap_share(seconds: dict[str, float]) -> float:
    """Fraction of the stages' seconds spent on swaps. Selecting the starting mask counts as "start", not as a swap."""
    return sum(spent for stage, spent in seconds.items() if stage.endswith("swap")) / sum(seconds.values())


def benchmark(config: BenchmarkConfig) -> dict:
    """Prune and measure the speed of the fastest repetition.

    Returns:
        `stages`: for each stage, summed over blocks, `seconds`, `operations`, `flops` (operations per second) and
            `fraction_of_peak`.
        `whole`, `steady`: the same for the whole run and for one block without compilation (`steady_block`).
        `wall_seconds`: of every repetition.
        `blocks`: seconds of every stage, block by block.
        `swap_share`: fraction of the stages' seconds, compilation included.
        `peak`: operations per second of the fastest matrix product, and of each shape.
        `compilation`: of all repetitions.
        `peak_memory` (of the process so far), `device`, `versions`, `options`: from run.json of the first repetition.
    """
    model = build_model(open_checkpoint(config.ckpt).config, jnp.dtype(config.compute_dtype))
    tokens, dtype = micro_batch_tokens(config), jnp.dtype(config.compute_dtype)
    before = matmul_rates(model, tokens, dtype)
    watch = CompilationWatch()
    records, seconds = prune_repeatedly(config)
    compilation = watch.figures()
    after = matmul_rates(model, tokens, dtype)
    peaks = {shape: max(rate, after[shape]) for shape, rate in before.items()}
    peak = max(peaks.values())

    def rate(spent: float, needed: int) -> dict:
        flops = needed / spent if spent else 0.0
        return {"seconds": spent, "operations": needed, "flops": flops, "fraction_of_peak": flops / peak}

    best = records[seconds.index(min(seconds))]
    needed = operations.run_operations(model, config)
    stage_seconds = best["totals"]["seconds_per_stage"]
    return {
        "whole": rate(min(seconds), sum(needed.values())),
        "wall_seconds": seconds,
        "steady": steady_block(model, config, best["blocks"], rate),
        "stages": {stage: rate(spent, needed.get(stage, 0)) for stage, spent in stage_seconds.items()},
        "blocks": [block["seconds"] for block in best["blocks"]],
        "swap_share": swap_share(stage_seconds),
        "peak": {"flops": peak, "shapes": peaks},
        "compilation": compilation,
        **{key: records[0][key] for key in ("peak_memory", "device", "versions", "options")},
    }


def show(figures: dict) -> None:
    """Print the result of `benchmark` as a table and a few lines."""
    table = Table("stage", "seconds", "GFLOP", "GFLOP/s", "% of peak")
    steady = figures["steady"]
    rows = [*figures["stages"].items(), ("whole run", figures["whole"])]
    rows += [("steady block", steady)] if steady else []
    for name, row in rows:
        counted = row["operations"] > 0
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['operations'] / 1e9:.1f}" if counted else "",
            f"{row['flops'] / 1e9:.1f}" if counted else "",
            f"{row['fraction_of_peak']:.1%}" if counted else "",
        )
    console = plain_console(width=FILE_WIDTH)
    console.print(table)
    compilation, cache, wall = figures["compilation"], figures["compilation"]["cache"], figures["wall_seconds"]
    memory, device = figures["peak_memory"], figures["device"]
    lines = [
        f"peak {figures['peak']['flops'] / 1e9:.1f} GFLOP/s; matrix products (tokens x in x out): "
        + ", ".join(f"{shape} {rate / 1e9:.0f}" for shape, rate in figures["peak"]["shapes"].items()),
        f"swaps take {figures['swap_share']:.1%} of the stages' seconds"
        + (f", {steady['swap_share']:.1%} in a steady block" if steady else ""),
        f"wall seconds of each pruning: {', '.join(f'{spent:.2f}' for spent in wall)} (best {min(wall):.2f})",
        f"compilation {sum(compilation['seconds'].values()):.2f} s ({compilation['programs']} programs; "
        f"cache: {cache['hits']} hits, {cache['misses']} misses)",
        f"peak memory: host {memory['host_bytes'] / 1e9:.2f} GB"
        + (f", device {memory['device_bytes'] / 1e9:.2f} GB" if "device_bytes" in memory else ""),
        f"{device['kind']} ({device['platform']}), jax {figures['versions']['jax']}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def run(arguments: list[str] | None = None) -> None:
    """Command line: print the results, and write them to --json."""
    config = BenchmarkConfig.parse("barber_jax.eval.benchmark", arguments)
    prepare_jax(config.compilation_cache, config.matmul_precision)
    with output_file(config.json) as file:
        figures = benchmark(config)
        if file:
            write_whole(file, json.dumps(figures, indent=1) + "\n")
    show(figures)


if __name__ == "__main__":
    exit_with_one_line(run)
