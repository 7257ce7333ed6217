"""The `recover` section of a grid: which commands it gives, and which finished recoveries it takes for its own."""

import json
import shutil
from pathlib import Path

import pytest
from recovered import recover_json, run_json, write_masks, write_recovered

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.eval import grid as module
from barber_jax.eval.grid import read_grid, run_grid
from barber_jax.eval.runs import load_runs
from barber_jax.recovery.recover_config import RecoverConfig
from barber_jax.reports.run_record import plain_options

GRID = """
prune: {samples: 4, length: 16}
sweep: [{method: [magnitude, wanda], rebuild: false}]
recover: {text: prose.txt, tokens: 650, length: 16, batch: 4, rate: 0.01}
"""
NAMES = ["method=magnitude,rebuild=no", "method=wanda,rebuild=no"]


@pytest.fixture
def ran(monkeypatch):
    """What a grid runs: (module, words) of each command, of which the records alone are written."""
    commands = []

    def run(name, arguments, log):
        commands.append((name, list(arguments)))
        config = (PruneConfig if name == "prune" else RecoverConfig).parse(f"barber_jax.{name}", arguments)
        options = plain_options(config.as_dict())
        if name == "prune":
            pattern = config.sparsity_pattern
            options |= {"pattern": str(pattern), "sparsity": pattern.sparsity}
            config.out.mkdir(parents=True)
            (config.out / "run.json").write_text(json.dumps(run_json(**options)))
            write_masks(config.out)
        else:
            run = json.loads((Path(config.ckpt) / "run.json").read_text())
            content = recover_json(steps=11, source={"checkpoint": config.ckpt, "run": run})
            # As a run fills them in.
            content["options"] = {**options, "steps": 11, "tokens": None, "micro_batch": 4, "remat": "light"}
            write_recovered(config.out, content)

    monkeypatch.setattr(module, "_run_module", run)
    return commands


@pytest.fixture
def grid(tmp_path):
    def read(text=GRID):
        (tmp_path / "grid.yaml").write_text(text)
        return read_grid([tmp_path / "grid.yaml"])

    return read


def test_every_run_is_recovered_and_listed_beside_itself(ran, grid, tmp_path):
    folders = run_grid(grid(), "some/model", tmp_path / "out", lambda line: None)
    assert [folder.name for folder in folders] == [f"{name}{end}" for name in NAMES for end in ("", ",recovered")]
    assert [name for name, _ in ran] == ["prune", "recover"] * 2
    config = RecoverConfig.parse("barber_jax.recover", ran[1][1])
    assert (config.ckpt, config.teacher, config.tokens, config.rate) == (str(folders[0]), "some/model", 650, 0.01)
    assert [bool(run.recovered) for run in load_runs(folders)] == [False, True, False, True]
    # What is there is not run again; a recovery that was cut off is resumed.
    shutil.rmtree(folders[3])
    (tmp_path / "out" / f"{folders[3].name}.run").mkdir()
    ran.clear()
    assert run_grid(grid(), "some/model", tmp_path / "out", lambda line: None) == folders
    assert [(name, "--resume" in words) for name, words in ran] == [("recover", True)]


def test_recoveries_of_another_grid_are_refused(ran, grid, tmp_path):
    folders = run_grid(grid(), "some/model", tmp_path / "out", lambda line: None)
    ran.clear()
    for old, new, says in [
        ("rate: 0.01", "rate: 0.02", "--rate 0.01, not 0.02"),
        ("tokens: 650", "tokens: 800", "--steps 11, not 13"),
        ("prose.txt", "other.txt", "--text prose.txt, not other.txt"),
    ]:
        with pytest.raises(BarberError, match=f"recovered holds a recovery with {says}; choose another --out"):
            run_grid(grid(GRID.replace(old, new)), "some/model", tmp_path / "out", lambda line: None)
    assert not ran
    # The pruned run was made again.
    record = json.loads((folders[0] / "run.json").read_text())
    record["totals"]["seconds"] += 1
    (folders[0] / "run.json").write_text(json.dumps(record))
    with pytest.raises(BarberError, match=r"holds a recovery of another run than .*magnitude"):
        run_grid(grid(), "some/model", tmp_path / "out", lambda line: None)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{tokens: 650}", "grid: recover: missing --text"),
        ("{text: a.txt, rank: 4}", "grid: recover: --rank 4 needs --scope lora"),
        ("{text: a.txt, steps: [1, 2]}", "grid: recover: --steps"),
        ("{text: a.txt, scope: none}", "grid: recover: --scope"),
    ],
)
def test_bad_values_are_found_before_anything_runs(section, says, ran, grid, tmp_path):
    text = "".join(f"recover: {section}\n" if line.startswith("recover") else f"{line}\n" for line in GRID.split("\n"))
    with pytest.raises(BarberError) as error:
        run_grid(grid(text), "some/model", tmp_path / "out", lambda line: None)
    assert says in str(error.value), str(error.value)
    assert not ran and not (tmp_path / "out").exists()
