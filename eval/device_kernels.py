"""Times the computations that a run consists of, alone: matrix products, attention and selection (of device_check).

    python -m barber_jax.eval.device_kernels --json FILE [--shape llama-7b] [--seconds 60]

Everything is timed on random arrays of the shape's sizes. The file is written again after every figure, so that what
is there stays when the process is stopped.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from barber_jax.console.command import parse
from barber_jax.console.errors import exit_with_one_line
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.devices.options import MatmulPrecision
from barber_jax.devices.settings import prepare_jax
from barber_jax.eval.synthetic import Shape
from barber_jax.masks import selection
from barber_jax.models.attention import attend_in_loop, attend_in_spans
from barber_jax.reports.run_record import environment

SHAPES = {
    "llama-7b": Shape(vocabulary=1024),
    "llama-3-8b": Shape(intermediate=14336, kv_heads=8, vocabulary=1024),
    "small": Shape(blocks=4, hidden=256, intermediate=704, heads=4, vocabulary=1024),
}
"""Name -> sizes of the model whose blocks are timed. Few tokens: the embedding does not matter to the speed."""
ShapeName = Literal[*SHAPES]
LENGTHS = {"llama-7b": (2048, 8192, 512, 4096, 1024), "llama-3-8b": (2048, 8192, 512, 4096, 1024), "small": (128, 512)}
"""Shape -> tokens in a sample at which attention is timed, the ones of most interest first."""
TOKENS = {"llama-7b": 16384, "llama-3-8b": 16384, "small": 1024}
"""Shape -> tokens of all samples together."""
PRECISIONS = get_args(MatmulPrecision)
"""Of float32 matrix products, the full one first."""
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Time matrix products, attention and selection on random arrays."""

    json: Path
    """File for the results."""
    shape: ShapeName = "llama-7b"
    """Sizes of the arrays."""
    seconds: float = 60
    """Begin no further measurement after this time."""


@dataclass
class Measurements:
    """Figures as they come in; written to `path` after each.

    Attributes:
        content: what the file holds.
    """

    path: Path
    seconds: float
    content: dict = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.start > self.seconds

    def add(self, part: str, entry: object) -> None:
        """Append an entry to the list `part`."""
        self.content.setdefault(part, []).append(entry)
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def median_seconds(function: Callable, *arguments: jax.Array) -> float:
    """Median seconds of a jitted function, after a first call that compiles it."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def timed(function: Callable, *arguments: jax.Array) -> dict:
    """`seconds` of a jitted function; or `error`, one line, where the device cannot run it."""
    try:
        return {"seconds": median_seconds(function, *arguments)}
    except Exception as error:  # whatever a backend raises: a kernel that does not exist, memory that is not there
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:200]}"}


def driver() -> str:
    """Version of the device's driver, as far as it can be found out."""
    if jax.default_backend() == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    return jax.extend.backend.get_backend().platform_version.splitlines()[-1].strip()


def random(*shape: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    """Normal random array on the device."""
    return jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype))(jax.random.key(seed))


def matrix_products(shape: Shape, tokens: int) -> Iterator[dict]:
    """Rate of X W of the MLP's first linear, for each dtype and precision."""
    for dtype, precision in (("bfloat16", "default"), *(("float32", precision) for precision in PRECISIONS)):
        x, weight = random(tokens, shape.hidden, dtype=dtype), random(shape.hidden, shape.intermediate, dtype=dtype)
        found = timed(jax.jit(partial(jnp.matmul, precision=precision)), x, weight)
        yield {"dtype": dtype, "precision": precision, **found} | _rate(found, 2 * tokens * weight.size)


def _rate(found: dict, operations: int) -> dict:
    return {"flops": operations / found["seconds"]} if "seconds" in found else {}


def attentions(shape: Shape, tokens: int, lengths: tuple[int, ...]) -> Iterator[dict]:
    """Attention of each length, forward and with its backward pass: ours and every implementation that JAX has."""
    heads, groups = shape.heads, shape.kv_heads or shape.heads
    size = shape.hidden // heads
    scale = size**-0.5
    implementations = {"barber_jax, loop": partial(attend_in_loop, scale=scale)}
    if jax.default_backend() == "cpu":
        implementations["barber_jax, spans"] = partial(attend_in_spans, scale=scale)
    for name in ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",):
        implementations[f"jax.nn ({name})"] = partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=name
        )
    for dtype in ("bfloat16", "float32"):
        for length in lengths:
            samples = max(1, tokens // length)
            q = random(samples, length, heads, size, dtype=dtype)
            k, v = (random(samples, length, groups, size, dtype=dtype, seed=seed) for seed in (1, 2))
            needed = samples * 4 * shape.hidden * length * (length + 1) // 2
            for name, function in implementations.items():
                for direction, program, passes in (
                    ("forward", jax.jit(function), 1),
                    ("forward and backward", jax.jit(jax.grad(_summed(function), argnums=(0, 1, 2))), 3),
                ):
                    found = timed(program, q, k, v)
                    entry = {"dtype": dtype, "length": length, "implementation": name, "direction": direction}
                    yield entry | found | _rate(found, passes * needed)


def _summed(function: Callable) -> Callable:
    return lambda *arguments: jnp.sum(jnp.square(function(*arguments).astype(jnp.float32)))


def selections(shape: Shape) -> Iterator[dict]:
    """Selection on the MLP's first linear: half of every group, and the swaps of a rebuild with alpha 0.1."""
    scores = jnp.abs(random(shape.intermediate, shape.hidden))
    metric, alpha = jnp.abs(random(shape.intermediate, shape.hidden, seed=1)), jnp.float32(0.1)
    for method in ("count", "top_k"):
        for granularity in ("output1", "input1"):
            axes = selection.AXES[granularity]
            prune = scores.shape[axes[0]] // 2
            keep = jax.jit(partial(selection.keep_highest, prune=prune, axes=axes, selection=method))
            entry = {"selection": method, "granularity": granularity}
            yield {**entry, "what": "starting mask", **timed(keep, scores)}
            mask = keep(scores)
            swap = partial(selection.swap, granularity=granularity, selection=method)
            yield {**entry, "what": "swap", **timed(lambda m, k, s=swap: s([m], [k], alpha), metric, mask)}
        keep = jax.jit(partial(selection.keep_n_of_m, keep=2, of=4, selection=method))
        yield {"selection": method, "granularity": "2:4", "what": "starting mask", **timed(keep, scores)}
        swap = partial(selection.swap_n_of_m, keep=2, of=4, selection=method)
        found = timed(lambda m, k, s=swap: s(m, k, alpha), metric, keep(scores))
        yield {"selection": method, "granularity": "2:4", "what": "swap", **found}


def measure(shape: Shape, tokens: int, lengths: tuple[int, ...], into: Measurements) -> None:
    """Measure everything, as long as there is time."""
    parts = {
        "matrix_products": matrix_products(shape, tokens),
        "selection": selections(shape),
        "attention": attentions(shape, tokens, lengths),
    }
    for part, entries in parts.items():
        for entry in entries:
            into.add(part, entry)
            if into.over:
                return


def run(arguments: list[str] | None = None) -> None:
    """Command line: write the figures to --json."""
    config = parse(KernelsConfig, "barber_jax.eval.device_kernels", arguments)
    prepare_jax()
    with output_file(config.json) as file, jax.default_matmul_precision("highest"):
        measurements = Measurements(file, config.seconds, environment(jax.devices()) | {"driver": driver()})
        measure(SHAPES[config.shape], TOKENS[config.shape], LENGTHS[config.shape], measurements)


if __name__ == "__main__":
    exit_with_one_line(run)
