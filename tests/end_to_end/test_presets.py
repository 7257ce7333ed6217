"""Presets and the options they stand for; what `--help` shows."""

import dataclasses
import inspect
import json
import re

import pytest
from cli import command, interrupted_after, prune_masks

from barber_jax import prune
from barber_jax.config import PRESETS, PruneConfig
from barber_jax.console.errors import BarberError

GIVEN = {"ckpt": "dense", "out": "out"}


def test_paper_is_the_default_and_changes_nothing():
    assert PruneConfig(**GIVEN).as_dict() == PruneConfig(**GIVEN, preset="paper").as_dict()
    assert PRESETS["paper"] == {}
    plain = PruneConfig(**GIVEN)
    assert (plain.rebuild, plain.refine, plain.reconstruct, plain.token_weighting) == (True, 0, 0, "none")


@pytest.mark.parametrize("preset", ["mask", "best"])
def test_a_preset_is_the_options_it_stands_for(preset):
    spelled_out = PruneConfig(**GIVEN, **PRESETS[preset]).as_dict()
    assert PruneConfig(**GIVEN, preset=preset).as_dict() == {**spelled_out, "preset": preset}
    line = ["--ckpt", "dense", "--out", "out", "--preset", preset]
    parsed = PruneConfig.parse("barber_jax.prune", line)
    assert parsed.as_dict() == {**spelled_out, "preset": preset, "out": parsed.out}
    assert PruneConfig.parse("barber_jax.prune", [*line[:4], f"--preset={preset}"]) == parsed


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--reconstruct", "5"], "reconstruct", 5),
        (["--rebuild"], "rebuild", True),
        (["--token-weighting", "none"], "token_weighting", "none"),
        (["--refine", "0"], "refine", 0),
    ],
)
def test_any_option_given_wins(options, name, value):
    line = ["--ckpt", "dense", "--out", "out"]
    for order in (["--preset", "best", *options], [*options, "--preset", "best"]):
        config = PruneConfig.parse("barber_jax.prune", [*line, *order])
        assert getattr(config, name) == value
        others = {key: each for key, each in PRESETS["best"].items() if key != name}
        assert {key: getattr(config, key) for key in others} == others
    assert getattr(PruneConfig(**GIVEN, preset="best", **{name: value}), name) == value


def test_run_json_spells_a_preset_out(tiny, tiny_ids, tmp_path):
    common = ["--samples", 8, "--length", 16, "--reconstruct", 3]
    prune_masks(tmp_path / "preset", tiny(), tiny_ids, *common, "--preset", "best", "--refine", 2)
    spelled_out = ["--no-rebuild", "--token-weighting", "norm", "--refine", 2]
    prune_masks(tmp_path / "options", tiny(), tiny_ids, *common, *spelled_out)
    preset, options = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("preset", "options"))
    assert preset["options"] == {**options["options"], "preset": "best", "out": str(tmp_path / "preset")}
    weights = "model.safetensors"
    assert (tmp_path / "preset" / weights).read_bytes() == (tmp_path / "options" / weights).read_bytes()


def test_a_run_of_a_preset_is_resumed_by_its_options_spelled_out(tiny, tiny_ids, tmp_path):
    line = ["--ckpt", tiny(), "--calibration", tiny_ids, "--out", tmp_path / "out", "--samples", 8, "--length", 16]
    line = [*map(str, line), "--reconstruct", "2"]
    with interrupted_after(1):
        prune.run([*line, "--preset", "best"])
    with pytest.raises(BarberError, match="--refine was 10"):
        prune.run([*line, "--preset", "mask", "--resume"])
    prune.run([*line, "--no-rebuild", "--token-weighting", "norm", "--refine", "10", "--resume"])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "finest"}, "--preset finest is unknown; known are paper, mask, best"),
        ({"alhpa": 0.1}, "--alhpa is not an option"),
        ({"alpha": 3.0}, "--alpha 3 is outside"),
    ],
)
def test_bad_options_from_python(options, says):
    with pytest.raises(BarberError, match=says):
        PruneConfig(**GIVEN, **options)
    with pytest.raises(BarberError, match="missing --out"):
        PruneConfig(ckpt="dense")


def test_the_command_line_of_a_configuration_gives_it_again():
    for options in (
        {},
        {"preset": "best", "reconstruct": 7, "pattern": "2:4", "seed": 3},
        {"method": "sparsegpt", "retain_reconstruction": True, "alpha": 0.5, "offload_activations": True},
        {"preset": "mask", "rebuild": True, "alpha": "auto"},
    ):
        config = PruneConfig(**GIVEN, **options)
        again = PruneConfig.parse("barber_jax.prune", [*config.command_line(), "--out", "out"])
        assert again.as_dict() == config.as_dict()
    spelled_out = PruneConfig(**GIVEN, sparsity=0.5, pattern="unstructured", method="wanda", alpha=0.01)
    assert spelled_out.command_line() == PruneConfig(**GIVEN).command_line()


def test_help_groups_options_and_says_each_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        PruneConfig.parse("barber_jax.prune", ["--help"])
    shown = capsys.readouterr().out
    for heading in ("preset", "input", "pattern", "start", "rebuild", "beyond-the-paper", "devices", "files"):
        assert f" {heading} options " in shown
    sources = "".join(inspect.getsource(each) for each in PruneConfig.__mro__ if dataclasses.is_dataclass(each))
    for name in (field.name for field in dataclasses.fields(PruneConfig)):
        assert f"--{name.replace('_', '-')}" in shown
        assert re.search(rf'\n    {name}: [^\n]*\n    """[^\n]+"""\n', sources), f"{name}: not said in one line"


def test_best_shows_its_own_defaults():
    shown = command("prune", "--preset", "best", "--help").stdout
    assert "(default: 200)" in shown and "(default: norm)" in shown
