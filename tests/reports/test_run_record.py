"""run.json: what is written is read, and a record of version 1 is read as one of version 2."""

import json

import pytest
from cli import prune_masks
from mutations import DAMAGE, changed, places

from barber_jax.console.errors import BarberError
from barber_jax.console.structure import WrongStructure
from barber_jax.eval.runs import Run, load_run
from barber_jax.eval.study import as_json
from barber_jax.eval.tables import runs_table, seeds_table
from barber_jax.report import run as make_report
from barber_jax.reports.record_check import check_record
from barber_jax.reports.report_page import _settings, _tables, description, output_sparsity
from barber_jax.reports.run_record import VERSION, load_record

pytestmark = pytest.mark.usefixtures("drawn")


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


def test_a_damaged_record_is_refused_or_used(folder):
    """Every value of the first block and of the rest, one after the other, is replaced by others, or left out."""
    record, outputs = load_record(folder), output_sparsity(folder / "masks.safetensors")
    sound, refused, used = Run("sound", folder, record), 0, 0
    for place in places(record):
        if place[:1] == ("blocks",) and place[1:2] != (0,):
            continue
        for damage in [(), *((value,) for value in DAMAGE)]:
            damaged = changed(record, place, *damage)
            try:
                check_record(damaged)
            except WrongStructure as error:
                assert str(error)
                refused += 1
                continue
            used += 1
            # What does not make a plot, which takes a second, is made of each.
            description(damaged), _settings(damaged, damaged["options"]), list(_tables(damaged, outputs))
            run = Run("damaged", folder, damaged)
            runs_table([sound, run]), seeds_table([sound, run]), as_json([sound, run], [], [])
            assert run.start_masks is None or run.start_masks.is_file()
            assert run.model
    assert refused > 1000 and used > 200


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (
            ("blocks", 1, "sub_blocks", 0, "sparsity"),
            "x",
            r"blocks\[1\]\.sub_blocks\[0\]\.sparsity is missing or not a",
        ),
        (("blocks", 1, "sub_blocks"), [], r"blocks\[1\]\.sub_blocks is missing or not a list of 1 or more entries"),
        (("options", "rebuild"), 1, "options.rebuild is missing or not true or false"),
        (("totals", "weights"), 0, "totals.weights is missing or not an integer of at least 1"),
        (("totals", "seconds"), 10**400, "totals.seconds is missing or not a number between 0 and 1e"),
        (("device",), {}, "device.platform is missing or not text"),
        (("versions",), {}, "versions.barber_jax is missing"),
    ],
)
def test_the_message_names_the_place(folder, tmp_path, place, value, says):
    (tmp_path / "run.json").write_text(json.dumps(changed(load_record(folder), place, value)))
    with pytest.raises(BarberError, match=rf"run\.json: damaged: {says}.*; prune again"):
        load_record(tmp_path)


def test_masks_of_another_run(folder, tmp_path):
    record = load_record(folder)
    for block in record["blocks"]:
        matrices = block["sub_blocks"][0]["matrices"]
        matrices["other"] = matrices.pop(next(iter(matrices)))
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "masks.safetensors").write_bytes((folder / "masks.safetensors").read_bytes())
    with pytest.raises(BarberError, match=r"run\.json and masks\.safetensors are of different runs"):
        make_report([str(tmp_path)])


ZERO_SHOT = {"format": "barber_jax.zero_shot", "version": 1, "limit": None, "tasks": {"rte": {"acc": 0.5}}, "mean": 0.5}
PERPLEXITY = {"source": "a.txt", "perplexity": 9.5}


def test_results_beside_a_run_are_checked(tmp_path):
    for name, sound in (("zero_shot.json", ZERO_SHOT), ("perplexity.json", PERPLEXITY)):
        path = tmp_path / name
        path.write_text(json.dumps(sound))
        assert load_run(tmp_path).zero_shot in ({}, {"rte": 0.5, "mean": 0.5})
        seen = []
        for place in places(sound):
            for value in ("x" * 3, None, [1], 10**400, True, -1):
                path.write_text(json.dumps(changed(sound, place, value)))
                try:
                    load_run(tmp_path)
                except BarberError as error:
                    assert str(error).startswith(str(path)) and str(error).endswith("measure again")
                    seen.append((place, value))
        assert (("perplexity",) if name == "perplexity.json" else ("tasks", "rte", "acc"), "xxx") in seen
        for content in ("[]", "3", '{"results": []}', '{"results": 3}', "[" * 9999, '"\\ud800"'):
            path.write_text(content)
            with pytest.raises(BarberError, match="measure again"):
                load_run(tmp_path)
        path.unlink()
