"""run.json: what is written is read, and a record of version 1 is read as one of version 2."""

import json

import pytest
from cli import prune_masks

from barber_jax.console.errors import BarberError
from barber_jax.eval.runs import load_run
from barber_jax.report import run as make_report
from barber_jax.reports.run_record import VERSION, load_record


@pytest.fixture(scope="module")
def folder(tiny, tiny_ids, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    prune_masks(out, tiny(), tiny_ids, "--samples", 8, "--length", 8, "--refine", 2, "--reconstruct", 2)
    return out


def as_version_1(record):
    """The record as barber_jax 0.1.0 wrote it."""
    text = json.dumps({**record, "version": 1})
    for new, old in (
        ("validation_loss_before", "apart_before"),
        ("validation_loss_after", "apart_after"),
        ("regrown", "revived"),
        ("best_steps", "steps"),
    ):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    return json.loads(text)


def test_version_1_is_read_as_version_2(folder, tmp_path, capsys):
    record = load_record(folder)
    assert record["version"] == VERSION == 2
    (tmp_path / "masks.safetensors").write_bytes((folder / "masks.safetensors").read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(as_version_1(record)))
    assert load_record(tmp_path) == record
    assert load_run(tmp_path).record == record
    make_report([str(tmp_path)])
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("version", [0, 3, "1", None, 1.5])
def test_other_versions_are_refused(folder, tmp_path, version):
    (tmp_path / "run.json").write_text(json.dumps({**load_record(folder), "version": version}))
    with pytest.raises(BarberError, match=r"run\.json: version"):
        load_record(tmp_path)
