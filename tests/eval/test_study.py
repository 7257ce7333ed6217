"""Studies: agreement of masks, tables, grids of settings."""

import importlib
import json
import math
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
from cli import ORACLES, command, prune_masks

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.eval import grid as grid_module
from barber_jax.eval import study as study_module
from barber_jax.eval.agreement import agreement
from barber_jax.eval.grid import prune_arguments, read_grid, run_grid, settings
from barber_jax.eval.runs import load_runs
from barber_jax.masks.mask_file import read_masks
from barber_jax.reports.figures import Plots

LLAMA, OPT = ORACLES / "llama", ORACLES / "opt"
IDS = LLAMA / "calibration_ids.npy"
QUICK = ["--samples", 4, "--length", 32]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs of one model, the last without starting masks."""
    root = tmp_path_factory.mktemp("runs")
    for name, options in (
        ("a", ["--alpha", 0.3, "--save-start"]),
        ("b", ["--alpha", 0.3, "--granularity", "layer", "--save-start", "--compute-dtype", "bfloat16"]),
        ("c", ["--method", "magnitude", "--no-rebuild"]),
    ):
        prune_masks(root / name, LLAMA, IDS, *QUICK, *options)
    return [root / name for name in "abc"]


def jaccard(one, other):
    return (one & other).sum() / (one | other).sum()


def test_agreement_is_jaccards_index(folders):
    pairs = agreement(load_runs(folders))
    assert [(a.name, b.name) for a, b, _, _ in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    masks = {folder.name: read_masks(folder / "masks.safetensors") for folder in folders}
    starts = {folder.name: read_masks(folder / "start_masks.safetensors") for folder in folders[:2]}
    for a, b, pruned, swapped in pairs:
        one, other = masks[a.name], masks[b.name]
        for name in one.names():
            assert pruned.per_matrix[name] == pytest.approx(jaccard(~one.read(name), ~other.read(name)))
        if (a.name, b.name) != ("a", "b"):
            assert swapped is None
            continue
        moved = [{n: masks[x].read(n) ^ starts[x].read(n) for n in one.names()} for x in "ab"]
        for name in one.names():
            assert swapped.per_matrix[name] == pytest.approx(jaccard(moved[0][name], moved[1][name]))
        both = sum((moved[0][n] & moved[1][n]).sum() for n in one.names())
        either = sum((moved[0][n] | moved[1][n]).sum() for n in one.names())
        assert swapped.overall == pytest.approx(both / either)


def test_a_run_agrees_with_itself(folders, tmp_path):
    copy = shutil.copytree(folders[0], tmp_path / "again")
    ((_, _, pruned, swapped),) = agreement(load_runs([folders[0], copy]))
    assert pruned.overall == swapped.overall == 1


def test_the_command_writes_tables_and_pages(folders, tmp_path):
    (folders[2] / "perplexity.json").write_text(
        json.dumps({"ckpt": "x", "source": "some/text.txt", "perplexity": 12.345, "windows": 1})
    )
    tasks = {"rte": {"acc": 0.5}, "boolq": {"acc": 0.25}}
    zero_shot = {"format": "barber_jax.zero_shot", "version": 1, "limit": 9, "tasks": tasks, "mean": 0.375}
    (folders[2] / "zero_shot.json").write_text(json.dumps(zero_shot))
    try:
        done = command("eval.study", *folders, "--out", tmp_path / "out")
    finally:
        (folders[2] / "perplexity.json").unlink()
        (folders[2] / "zero_shot.json").unlink()
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "study.md").read_text()
    assert text in done.stdout
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()[:5]]
    assert {
        "run",
        "--method",
        "--granularity",
        "--compute-dtype",
        "perplexity, text.txt",
        "zero-shot mean (first 9)",
    } <= set(head)
    assert "--samples" not in head
    assert [row[0] for row in rows] == ["a", "b", "c"]
    assert (
        rows[2][head.index("perplexity, text.txt")] == "12.35"
        and rows[2][head.index("zero-shot mean (first 9)")] == "37.50"
    )
    content = json.loads((tmp_path / "out" / "study.json").read_text())
    assert len(content["runs"]) == len(content["agreement"]) == 3
    assert content["agreement"][0]["swaps"]["jaccard"] < 1
    html = (tmp_path / "out" / "study.html").read_text()
    assert html.count("<figure") == 6 and "http://" not in html.replace("http://www.w3.org", "")


def test_runs_that_differ_in_their_seed_alone_are_put_together(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Plots, "draw", Plots.draw.__wrapped__)
    copies = []
    for seed, perplexity in ((1, 10.0), (2, 12.0), (7, 17.0)):
        copies.append(shutil.copytree(folders[2], tmp_path / f"seed{seed}"))
        record = json.loads((copies[-1] / "run.json").read_text())
        record["options"]["seed"] = seed
        (copies[-1] / "run.json").write_text(json.dumps(record))
        measured = {"ckpt": "x", "source": "text.txt", "perplexity": perplexity, "windows": 1}
        (copies[-1] / "perplexity.json").write_text(json.dumps(measured))
    text = study_module.study(load_runs([folders[0], *copies]), tmp_path / "out")
    _, _, table = text.partition("Over seeds, mean ± standard deviation:\n\n")
    head, _, row, *_ = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert (head[0], row[0]) == ("runs", "3")
    assert "--seed" not in head and "--method" not in head
    # Of 10, 12 and 17, by hand: deviations -3, -1 and 4, squares 26, over 2 runs 13.
    assert row[head.index("perplexity, text.txt")] == "13.00 ± 3.61"
    assert "<h2>Over seeds</h2>" in (tmp_path / "out" / "study.html").read_text()
    assert "Over seeds" not in study_module.study(load_runs(folders), tmp_path / "out")


def refused(*arguments):
    with pytest.raises(BarberError) as error:
        study_module.run([str(argument) for argument in arguments])
    return str(error.value)


def test_runs_of_different_models(folders, tmp_path):
    prune_masks(tmp_path / "opt", OPT, OPT / "calibration_ids.npy", *QUICK, "--method", "magnitude", "--no-rebuild")
    assert "different models" in refused(
        folders[0], tmp_path / "opt", "--agreement", "require", "--out", tmp_path / "out"
    )
    done = command("eval.study", folders[0], tmp_path / "opt", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "a and opt are of different models" in done.stdout and "| opt |" in done.stdout


def test_bad_input(folders, tmp_path):
    assert "holds no run.json" in refused(tmp_path)
    assert "nothing to compare" in refused()
    assert "--grid and --ckpt go together" in refused("--grid", "a.yaml")
    other = shutil.copytree(folders[0], tmp_path / "other")
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "version": 7}))
    assert "version 7" in refused(other, folders[1])
    (other / "run.json").write_text(json.dumps(record))
    (other / "zero_shot.json").write_text('{"format": "barber_jax.zero_shot", "version": 2}')
    assert "zero_shot.json" in refused(other, folders[1])


GRID = """
prune: {{sparsity: 0.5, calibration: {ids}, samples: 4, length: 32}}
sweep:
  - {{method: [magnitude, wanda], rebuild: false}}
  - {{method: [magnitude, wanda, sparsegpt], alpha: 0.3}}
  - {{method: sparsegpt, granularity: layer, retain_reconstruction: [true, false]}}
  - {{method: [wanda, sparsegpt], pattern: 2:4, rebuild: true}}
perplexity: {{tokens: [{eval_ids}], length: 32, windows: 2}}
"""


@pytest.fixture
def one_process(monkeypatch):
    """The runs of a grid take place in this process: that each has its own is not the point of a test."""

    def run(module, arguments, log):
        log(f"python -m barber_jax.{module} {shlex.join(arguments)}")
        importlib.import_module(f"barber_jax.{module}").run(list(arguments))

    monkeypatch.setattr(grid_module, "_run_module", run)


@pytest.fixture
def grid_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.format(ids=IDS, eval_ids=LLAMA / "eval_ids.npy"))
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sweeep: []", "unknown key 'sweeep'"),
        ("prune: {sparsty: 0.5}", "prune: unknown option 'sparsty'"),
        ("sweep: [{metod: wanda}]", "sweep: unknown option 'metod'"),
        ("sweep: [{out: a}]", "sweep: unknown option 'out'"),
        ("sweep: {method: wanda}", "sweep must be a list"),
        ("sweep: [{refine: [], rebuild: false}]", "an option with an empty list makes no run"),
        ("perplexity: {lenght: 3}", "perplexity: unknown option 'lenght'"),
        ("prune: 3", "prune must hold options"),
        ("recover: {teacher: a}", "recover: unknown option 'teacher'"),
        ("dense: perhaps", "dense must be true or false"),
        ("a: [", "not YAML"),
        ("- a", "must hold the keys"),
        ("prune: {samples: 3}", "no sweep"),
    ],
)
def test_bad_grids(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BarberError, match=str(path)) as error:
        read_grid([path])
    assert says in str(error.value)


def test_bad_values_are_found_before_anything_runs(tmp_path, grid_file):
    bad = tmp_path / "more.toml"
    bad.write_text('[[sweep]]\nmethod = "wanda"\nalpha = [0.1, 3]\n')
    with pytest.raises(BarberError, match="alpha 3 is outside"):
        settings(read_grid([grid_file, bad]), str(LLAMA))
    bad.write_text("= 3")
    with pytest.raises(BarberError, match="not TOML"):
        read_grid([bad])
    with pytest.raises(BarberError, match=r"gone\.yaml: no such file"):
        read_grid([tmp_path / "gone.yaml"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # A value that would be read as further options, were it put on a command line.
        ("sweep: [{calibration: [[x, --out, /somewhere, --overwrite]]}]", "it takes one value, not several"),
        ("prune: {calibration: [x, --overwrite]}\nsweep: [{method: wanda}]", "it takes one value, not several"),
        ("sweep: [{method: {wanda: --overwrite}}]", "it takes one value, not several"),
        ("sweep: [{preset: [[paper]]}]", "it takes one value, not several"),
        ("sweep: [{calibration: --overwrite}]", "begins like an option"),
        ("sweep: [{method: vanda}]", "--method 'vanda': choose one of magnitude, wanda"),
        ("sweep: [{samples: many}]", "--samples 'many': it must be an integer"),
        ("sweep: [{rebuild: perhaps}]", "--rebuild 'perhaps': it must be true or false"),
        ("sweep: [{samples: 1111111111111111111111111111111}]", "out of range"),
        (f"sweep: [{{seed: {list(range(101))}, samples: {list(range(1, 101))}}}]", "makes more than 10000 runs"),
        ("sweep: [{method: wanda}]\nperplexity: {text: [a, --json, b], length: 8}", "begins like an option"),
        ("sweep: [{method: wanda}]\nperplexity: {text: a}", "grid: missing --length"),
        ("sweep: [{method: wanda}]\nzero_shot: {limit: [1, 2]}", "it takes one value, not several"),
    ],
)
def test_values_of_a_grid_are_never_options(tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(grid_module, "_run_module", lambda *_: pytest.fail("something ran"))
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(BarberError) as error:
        run_grid(read_grid([path]), "some/model", tmp_path / "out", lambda _: None)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: &a [x, x]\n" + "".join(f"b{i}: &a{i} [*a, *a]\n" for i in range(9)), "unknown key 'a'"),
        ("a.yaml", "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30)), "unfolds to more"),
        ("a.yaml", "[" * 100_000, "nested too deeply"),
        ("a.toml", "a = " + "[" * 100_000, "nested too deeply"),
        ("a.toml", "prune = 1979-05-27", "prune must hold options"),
        ("a.yaml", "# " + "x" * 300_000, "more than the 262144 that are read"),
    ],
)
def test_grids_beyond_all_bounds(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(BarberError, match=says):
        read_grid([tmp_path / name])


@pytest.mark.parametrize(
    ("shared", "group", "runs"),
    [
        ("reconstruct_rate: 0.02", "reconstruct: [0, 5], rebuild: false", ["", "reconstruct 5 rate 0.02"]),
        ("target: same", "rebuild: [true, false], refine: [0, 3]", ["", "", "refine 3 same", "refine 3 same"]),
        ("rounds: 2", "rebuild: [true, false]", ["", "rounds 2"]),
        ("metric: w, alpha: auto", "rebuild: [true, false]", ["", "alpha auto metric w"]),
        ("samples: 4", "reconstruct: [0, 5], reconstruct_scope: [weights, all], rebuild: false",
         ["", "reconstruct 5", "reconstruct 5 all"]),
    ],
)  # fmt: skip
def test_a_group_may_vary_a_stage_and_its_options(tmp_path, shared, group, runs):
    path = tmp_path / "grid.yaml"
    path.write_text(f"prune: {{{shared}}}\nsweep: [{{{group}}}]\n")

    def told(config):
        words = [f"alpha auto metric {config.metric}"] if config.alpha == "auto" else []
        words += [f"{name} {getattr(config, name)}" for name in ("refine", "reconstruct") if getattr(config, name)]
        words += [f"rate {config.reconstruct_rate}"] if config.reconstruct_rate != 0.01 else []
        words += [f"rounds {config.rounds}"] if config.rounds != 1 else []
        return " ".join(words + [v for v in (config.target, config.reconstruct_scope) if v in ("same", "all")])

    found = settings(read_grid([path]), str(LLAMA))
    assert [told(each.config) for each in found] == runs
    for each in found:
        line = prune_arguments(each, str(LLAMA), study_module.Path("out"))
        assert told(PruneConfig.parse("barber_jax.prune", line)) == told(each.config)


def test_settings_share_their_starts(grid_file):
    found = settings(read_grid([grid_file]), str(LLAMA))
    starts = [each for each in found if each.start is None]
    assert [each.name for each in starts] == [
        "method=magnitude,rebuild=no",
        "method=wanda,rebuild=no",
        "method=sparsegpt,rebuild=no",
        "method=wanda,pattern=2-4,rebuild=no",
        "method=sparsegpt,pattern=2-4,rebuild=no",
    ]
    assert not any(each.config.rebuild for each in starts)
    assert len(found) == 5 + 3 + 2 + 2
    assert all(each.start in starts for each in found if each.config.rebuild)
    assert len({each.name for each in found}) == len(found)


def test_a_renamed_start_is_found_by_its_runs(tmp_path):
    """A run and its start, both called by the method alone, get names of their own; the run starts from the start's."""
    path = tmp_path / "grid.yaml"
    path.write_text("prune: {reconstruct: 5}\nsweep: [{method: wanda, rebuild: false}]\n")
    start, run = settings(read_grid([path]), str(LLAMA))
    assert start.name != run.name and run.start == start
    line = prune_arguments(run, str(LLAMA), study_module.Path("out"))
    assert line[line.index("--masks") + 1] == f"out/{start.name}/masks.safetensors"


def test_a_preset_in_a_grid_is_the_options_it_stands_for(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("sweep: [{preset: [paper, mask, best]}]\n")
    found = settings(read_grid([path]), str(LLAMA))
    runs = [each.config for each in found if each.start]
    assert [(each.rebuild, each.refine, each.reconstruct) for each in runs] == [
        (True, 0, 0),
        (False, 30, 0),
        (False, 10, 200),
    ]
    assert len(found) == 4


def test_a_grid_gives_what_single_runs_give(one_process, grid_file, tmp_path):
    """One run for each way to reuse a start."""
    grid = read_grid([grid_file])
    wanted = {
        "method=wanda,alpha=0.3": ["--method", "wanda", "--alpha", 0.3],
        "method=sparsegpt,granularity=layer,retain_reconstruction=true": [
            "--method",
            "sparsegpt",
            "--retain-reconstruction",
        ],
        "method=wanda,pattern=2-4,rebuild=yes": ["--method", "wanda", "--pattern", "2:4"],
    }
    grid["sweep"] = [
        {"method": "wanda", "alpha": "0.3"},
        {"method": "sparsegpt", "granularity": "layer", "retain_reconstruction": "true"},
        {"method": "wanda", "pattern": "2:4", "rebuild": "true"},
    ]
    said = []
    folders = run_grid(grid, str(LLAMA), tmp_path / "out", said.append)
    assert folders[0].name == "dense" and len(folders) == 7
    for name, options in wanted.items():
        single = prune_masks(tmp_path / name, LLAMA, IDS, *QUICK, *options)
        shared = read_masks(tmp_path / "out" / name / "masks.safetensors")
        for matrix, mask in single.items():
            np.testing.assert_array_equal(shared.read(matrix), mask)
        assert (tmp_path / "out" / name / "model.safetensors").read_bytes() == (
            tmp_path / name / "model.safetensors"
        ).read_bytes()
    runs = load_runs(folders)
    assert all(math.isfinite(value) for run in runs for value in run.perplexity.values())
    assert [run.settings.get("method") for run in runs[-3:]] == ["wanda", "sparsegpt", "wanda"]
    assert all(run.start_masks for run in runs[-3:])
    text = study_module.study(runs, tmp_path / "out")
    assert "| dense |" in text
    # A second time there is nothing to do, and a run that is missing is made.
    processes = [line for line in said if line.startswith("python")]
    assert len(processes) == 7 + 6
    said.clear()
    shutil.rmtree(tmp_path / "out" / "method=wanda,alpha=0.3")
    run_grid(grid, str(LLAMA), tmp_path / "out", said.append)
    assert len([line for line in said if line.startswith("python")]) == 2
    # Measured with other options, it is measured again.
    said.clear()
    run_grid({**grid, "perplexity": {**grid["perplexity"], "windows": "1"}}, str(LLAMA), tmp_path / "out", said.append)
    assert [line.split()[2] for line in said if line.startswith("python")] == ["barber_jax.eval.perplexity"] * 7
    # Another grid in the same place is refused.
    grid["prune"] = {**grid["prune"], "samples": "3"}
    with pytest.raises(BarberError, match="--samples 4, not 3"):
        run_grid(grid, str(LLAMA), tmp_path / "out", said.append)
    grid["prune"] = {**grid["prune"], "samples": "4", "sparsity": "0.25"}
    grid["sweep"] = [{"method": "wanda", "rebuild": "false"}]
    with pytest.raises(BarberError, match=r"--sparsity 0\.5, not 0\.25"):
        run_grid(grid, str(LLAMA), tmp_path / "out", said.append)


def test_a_grid_of_stages_shares_starts_and_gives_what_single_runs_give(one_process, tmp_path):
    """To the bit where micro-batches are the same: holding samples apart can make them smaller."""
    path = tmp_path / "grid.yaml"
    path.write_text(f"""
prune: {{calibration: {IDS}, samples: 4, length: 32, batch: 1, method: sparsegpt}}
sweep:
  - {{rebuild: false, reconstruct: [0, 3], refine: [2]}}
  - {{alpha: auto, rounds: 2}}
dense: false
""")
    todo = settings(read_grid([path]), str(LLAMA))
    assert [each.start is None for each in todo] == [True, False, False, False]
    folders = run_grid(read_grid([path]), str(LLAMA), tmp_path / "out", lambda line: None)
    single = tmp_path / "single"
    options = ["--method", "sparsegpt", "--no-rebuild", "--batch", 1, "--reconstruct", 3, "--refine", 2]
    prune_masks(single, LLAMA, IDS, *QUICK, *options)
    made = next(folder for folder in folders if "reconstruct=3" in folder.name)
    assert (made / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_every_run_of_a_grid_is_a_process_of_its_own(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(f"prune: {{calibration: {IDS}, samples: 4, length: 32}}\nsweep: [{{method: magnitude}}]\n")
    folders = run_grid(read_grid([path]), str(LLAMA), tmp_path / "out", lambda line: None)
    assert all((folder / "run.json").is_file() for folder in folders)
    path.write_text(path.read_text().replace(str(IDS), str(tmp_path / "gone.npy")))
    with pytest.raises(BarberError, match="prune failed"):
        run_grid(read_grid([path]), str(LLAMA), tmp_path / "elsewhere", lambda line: None)


def test_a_grid_that_is_interrupted_lets_its_run_end_by_itself(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\nhere = pathlib.Path(__file__).parent\n"
        "def end(*_):\n    time.sleep(1)\n    (here / 'ended').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n(here / 'began').touch()\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def interrupt(*_):
        if (tmp_path / "began").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            grid_module._run_module("prune", [], lambda line: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "ended").exists()


def test_the_grids_that_come_with_the_package():
    from barber_jax.eval import grid

    shipped = sorted((study_module.Path(grid.__file__).parent / "grids").glob("*.yaml"))
    assert len(shipped) == 10
    small = [path for path in shipped if path.name in ("smollm2.yaml", "smollm2_64.yaml", "wikitext2.yaml")]
    for path in shipped:
        if path in small:
            continue
        for extra in ([], small):
            for setting in settings(read_grid([path, *extra]), "some/model"):
                line = prune_arguments(setting, "some/model", study_module.Path("out"))
                assert line[:2] == ["--ckpt", "some/model"]
