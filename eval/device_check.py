"""Checks masks and measures speed on the devices that JAX sees, without a checkpoint or a network.

    python -m barber_jax.eval.device_check --out DIR [--minutes 8] [--shape llama-7b]

(a) Masks of a packaged tiny model against those that a CPU gave, for every precision (device_masks).
(b) Seconds, operations and memory of the stages on a model of the real shape with random weights (benchmark).
(c) Matrix products, attention and selection alone (device_kernels).
(d) From (b), a forecast for the whole model.

Every step is a process of its own, so that the memory it reports is its own, and so that one that fails or takes too
long costs no other. DIR gets device_check.json, written again after every step, and device_check.html; `study` puts
several side by side.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from barber_jax.console import documents
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import expand, writing
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import write_whole
from barber_jax.console.terminal import plain_console
from barber_jax.eval import device_page, synthetic
from barber_jax.eval.device_kernels import PRECISIONS, SHAPES, ShapeName
from barber_jax.eval.device_page import CHECK_FILE, FORMAT, VERSION
from barber_jax.reports.page import page

BLOCKS = 2
"""Blocks of the model whose stages are timed: the first compiles, the second is the one that counts."""
SIZES = {"llama-7b": (128, 2048), "llama-3-8b": (128, 2048), "small": (16, 128)}
"""Shape -> calibration samples and tokens in each."""
LONGEST = 1 / 3
"""Share of --minutes that one step may take."""
LAYERS = 32
"""Blocks of the whole model, for the forecast."""
REBUILD = ("--method", "wanda", "--alpha", "0.1")
BFLOAT16, FLOAT32 = ("--compute-dtype", "bfloat16"), ("--compute-dtype", "float32")


@dataclass(frozen=True, kw_only=True)
class DeviceCheckConfig:
    """Check masks and measure speed on the devices that JAX sees."""

    out: Path
    """Folder for device_check.json, device_check.html and the log of every step."""
    minutes: float = 8
    """Stop after this time, with what there is by then."""
    shape: ShapeName = "llama-7b"
    """Model whose blocks are timed."""

    def __post_init__(self):
        if not 0 < self.minutes < 10000:
            raise BarberError(f"--minutes {self.minutes:g} must be above 0")


@dataclass
class Step:
    """A process that writes its figures to a JSON file.

    Attributes:
        part: masks, speed or kernels.
        name: for readers.
        module: of barber_jax.eval.
        arguments: of the module, without --json.
        log: file for its output.
        accelerators_only: whether a CPU would give the same as in another step.
        status: waiting, done, failed, out of time, or left out (it would tell nothing on a CPU).
        seconds: that the process took.
        error: the line that says why, where it failed.
        result: content of the JSON file, as far as it came.
    """

    part: str
    name: str
    module: str
    arguments: tuple[str, ...]
    accelerators_only: bool = False
    log: Path | None = None
    status: str = "waiting"
    seconds: float = 0.0
    error: str = ""
    result: dict = field(default_factory=dict)


def steps(shape: str, model: Path, ids: Path, longest: float) -> Iterator[Step]:
    """All steps, those of most interest first.

    Args:
        model, ids: the random checkpoint and calibration ids.
        longest: seconds that one step may take.
    """
    samples, length = SIZES[shape]
    prune = ("--ckpt", str(model), "--calibration", str(ids), "--samples", str(samples), "--length", str(length))

    def speed(name: str, *options: str, **more: bool) -> Step:
        return Step("speed", name, "benchmark", (*prune, "--sparsity", "0.5", *options), **more)

    def masks(name: str, *options: str, **more: bool) -> Step:
        return Step("masks", name, "device_masks", options, **more)

    only = {"accelerators_only": True}
    yield Step("kernels", "alone", "device_kernels", ("--shape", shape, "--seconds", f"{min(75, longest / 2):g}"))
    yield speed("wanda + rebuild, float32", *REBUILD)
    yield masks("float32", *FLOAT32)
    yield masks("bfloat16", *BFLOAT16)
    # Slow on a CPU, where bfloat16 is computed in float32.
    yield speed("wanda + rebuild, bfloat16", *REBUILD, *BFLOAT16)
    for precision in PRECISIONS[1:]:
        yield masks(f"float32, precision {precision}", "--matmul-precision", precision, **only)
    for precision in PRECISIONS[1:]:
        name = f"wanda + rebuild, float32, precision {precision}"
        yield speed(name, *REBUILD, "--matmul-precision", precision, **only)
    yield speed("wanda + rebuild, bfloat16, offloaded", *REBUILD, *BFLOAT16, "--offload-activations")
    beyond = ("--method", "wanda", "--no-rebuild", "--refine", "10", "--reconstruct", "50")
    yield speed("wanda, refine 10, reconstruct 50, bfloat16", *beyond, *BFLOAT16)
    yield speed("sparsegpt, float32", "--method", "sparsegpt", "--no-rebuild")
    yield speed("wanda + rebuild, float32, offloaded", *REBUILD, "--offload-activations")


def run_step(step: Step, seconds: float) -> None:
    """Run a step's process, for so many seconds at most, and take what it wrote."""
    with tempfile.TemporaryDirectory(prefix="barber_jax_device_check_") as temporary, step.log.open("wb") as output:
        result = Path(temporary) / "result.json"
        command = [sys.executable, "-m", f"barber_jax.eval.{step.module}", *step.arguments, "--json", str(result)]
        environment = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if step.part == "masks" else {})
        start = time.monotonic()
        # A session of its own, so that what it starts itself ends with it.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
        try:
            step.status = "done" if process.wait(timeout=max(seconds, 1)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            step.status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        step.seconds = time.monotonic() - start
        if result.is_file():
            step.result = documents.read(result)
    if step.status == "failed":
        step.error = error_line(step.log.read_text(encoding="utf-8", errors="replace"))


def error_line(log: str) -> str:
    """The line of a process's output that says why it failed: the last one that names an error, else the last."""
    lines = log.strip().splitlines() or ["it wrote nothing"]
    named = [line for line in lines if re.match(r"(error|[\w.]+(Error|Exception|Interrupt))\b", line)]
    return (named or lines)[-1][:500]


def forecast(step: Step) -> dict:
    """Seconds and memory of the whole model at the speed of the steady block: a calculation, not a measurement.

    Reading, committing and writing are left out; stream A is propagated through all blocks, as through the first.
    """
    blocks = step.result["blocks"]
    steady, first = dict(blocks[-1]), blocks[0]
    steady.setdefault("propagate", first.get("propagate", 0.0))
    apart = ("read", "commit")
    return {
        "name": step.name,
        "layers": LAYERS,
        "seconds": LAYERS * sum(spent for stage, spent in steady.items() if stage not in apart),
        "compiling_seconds": sum(step.result["compilation"]["seconds"].values()),
        "peak_memory": step.result["peak_memory"],
    }


def device_check(config: DeviceCheckConfig, say: Console) -> dict:
    """Run the steps until the time is up.

    Returns:
        content of device_check.json: `shape`; `environment` of the devices; `steps` with the attributes of `Step`;
        `forecast`.
    """
    deadline = time.monotonic() + 60 * config.minutes
    content = {"format": FORMAT, "version": VERSION, "shape": config.shape, "environment": {}}
    with writing(config.out), tempfile.TemporaryDirectory(prefix="barber_jax_device_check_") as temporary:
        config.out.mkdir(parents=True, exist_ok=True)
        model, ids = Path(temporary) / "model", Path(temporary) / "ids.npy"
        shape = SHAPES[config.shape]
        synthetic.write(model, synthetic.Shape(**{**vars(shape), "blocks": BLOCKS}))
        np.save(ids, np.random.default_rng(0).integers(0, shape.vocabulary, SIZES[config.shape], np.int32))
        longest = 60 * config.minutes * LONGEST
        planned = list(steps(config.shape, model, ids, longest))
        waiting = list(enumerate(planned))
        while waiting:
            platform = content["environment"].get("device", {}).get("platform")
            group = next_group(waiting, platform)
            for index, step in group:
                step.log = config.out / f"step_{index:02d}.log"
            left = min(deadline - time.monotonic(), longest)
            run_group([step for _, step in group], left, platform, say)
            content |= summary(planned)
            write(content, config.out)
    return content


def next_group(waiting: list[tuple[int, Step]], platform: str | None) -> list[tuple[int, Step]]:
    """Take the steps to run next, at the same time, off `waiting`: one, or on a GPU all comparisons of masks that
    follow each other, which are not timed and mostly compile. A TPU belongs to one process at a time, and on a CPU
    they would only slow each other down."""
    size = 1
    if platform not in (None, "tpu", "cpu"):
        while size < len(waiting) and waiting[0][1].part == waiting[size][1].part == "masks":
            size += 1
    group = waiting[:size]
    del waiting[:size]
    return group


def run_group(group: list[Step], left: float, platform: str | None, say: Console) -> None:
    """Run steps at the same time, for `left` seconds at most; those that come too late or would tell nothing are marked
    so."""
    for step in group:
        if left <= 0 or (step.accelerators_only and platform == "cpu"):
            step.status = "out of time" if left <= 0 else "left out"
    running = [step for step in group if step.status == "waiting"]
    with ThreadPoolExecutor(len(group)) as pool:
        list(pool.map(lambda step: run_step(step, left), running))
    for step in running:
        say.print(f"{step.part}, {step.name}: {step.status} in {step.seconds:.0f} s {step.error}")


def summary(planned: list[Step]) -> dict:
    """What the steps have given so far: entries `environment`, `steps` and `forecast` of device_check.json."""
    environment: dict = {}
    for step in planned:
        environment |= {key: step.result[key] for key in ("device", "versions", "driver") if key in step.result}
    done = [step for step in planned if step.part == "speed" and step.status == "done"]
    described = [
        vars(step) | {"arguments": list(step.arguments), "log": step.log and step.log.name} for step in planned
    ]
    return {"environment": environment, "steps": described, "forecast": [forecast(step) for step in done]}


def write(content: dict, out: Path) -> None:
    """Write device_check.json and device_check.html."""
    write_whole(out / CHECK_FILE, json.dumps(content, indent=1) + "\n")
    html = page("barber_jax device check", device_page.page_parts([(out.resolve().name, content)]))
    write_whole((out / CHECK_FILE).with_suffix(".html"), html)


def run(arguments: list[str] | None = None) -> None:
    """Command line: run the check, print its tables."""
    config = parse(DeviceCheckConfig, "barber_jax.eval.device_check", arguments)
    out = expand(config.out)
    with output_lock(out):
        content = device_check(dataclasses.replace(config, out=out), plain_console(sys.stderr))
    print(device_page.markdown_page([(out.resolve().name, content)]))
    print(f"{out / CHECK_FILE}, {Path(CHECK_FILE).with_suffix('.html')}")
    if not any(step["status"] == "done" for step in content["steps"]):
        raise BarberError(f"no step came to its end: {content['steps'][0]['error'] or 'give more --minutes'}")


if __name__ == "__main__":
    exit_with_one_line(run)
