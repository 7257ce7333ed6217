"""recover.json: what is written is read, and damaged ones are refused in one line."""

import json

import pytest
from mutations import DAMAGE, changed, files_of, fuzz, places
from recovered import measured, recover_json, run_json, write_recovered

from barber_jax.config import PruneConfig, recorded_command
from barber_jax.console.errors import BarberError
from barber_jax.console.structure import WrongStructure
from barber_jax.reports.recover_check import check_recover_record
from barber_jax.reports.recover_page import _evaluations, _origin, command_lines, description, headline
from barber_jax.reports.recover_record import MAX_TRAINING, read_recover_record, source_entry, thinned


def test_what_is_written_is_read(tmp_path):
    record = recover_json()
    assert read_recover_record(write_recovered(tmp_path, record)) == record
    # By hand: 40 steps of 1000 tokens in 80 seconds, and a million operations each, of a billion a second.
    assert (record["tokens"], record["tokens_per_second"], record["share_of_peak"]) == (40_000, 500, 0.5)
    assert record["versions"]["optax"] and record["processes"] == 1


def test_without_teacher_peak_and_perplexity(tmp_path):
    absent = {"matmul_flops": None, "dense_perplexity": None, "start_perplexity": None, "perplexity": None}
    record = recover_json(distilled=False, source={"checkpoint": "x", "run": None}, **absent)
    assert read_recover_record(write_recovered(tmp_path, record)) == record
    assert record["share_of_peak"] is None and record["perplexity"] is None


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 1500, 12345])
def test_training_is_thinned_by_means_of_spans(count):
    full = [{"step": n, "loss": float(n), "kl": None, "rate": 2.0 * n} for n in range(1, count + 1)]
    thin = thinned(full)
    assert len(thin) == min(count, MAX_TRAINING)
    if count <= MAX_TRAINING:
        assert thin == full
        return
    assert (thin[0], thin[-1]) == (full[0], full[-1])
    before = 1
    for each in thin[1:-1]:
        span = full[before : each["step"]]
        mean = sum(entry["loss"] for entry in span) / len(span)
        assert each == {
            "step": span[-1]["step"],
            "loss": pytest.approx(mean),
            "kl": None,
            "rate": pytest.approx(2 * mean),
        }
        before = each["step"]
    assert before == count - 1


def test_where_the_checkpoint_came_from(tmp_path):
    nothing = {"checkpoint": str(tmp_path), "run": None}
    assert source_entry(str(tmp_path)) == nothing
    assert source_entry("someone/model") == {"checkpoint": "someone/model", "run": None}
    (tmp_path / "run.json").write_text(json.dumps(run_json()))
    assert source_entry(str(tmp_path)) == {"checkpoint": str(tmp_path), "run": run_json()}
    # A record that cannot be read costs no recovery.
    (tmp_path / "run.json").write_text("{")
    assert source_entry(str(tmp_path)) == nothing
    # Recovered twice before.
    earlier = {"steps": 1, "tokens": 10, "seconds": 2.5}
    source = {"checkpoint": "pruned", "run": run_json(), "recovered": earlier}
    write_recovered(tmp_path, recover_json(source=source))
    assert source_entry(str(tmp_path)) == {
        "checkpoint": str(tmp_path),
        "run": run_json(),
        "recovered": {"steps": 41, "tokens": 40_010, "seconds": 102.5},
    }


def test_a_damaged_record_is_refused_or_used():
    """Every value outside `source.run` is replaced by others in turn, or left out; of lists, in their first entry."""
    record, refused, used = recover_json(), 0, 0
    for place in places(record):
        if place[:2] == ("source", "run") or any(isinstance(key, int) and key > 0 for key in place):
            continue
        for damage in [(), *((value,) for value in DAMAGE)]:
            damaged = changed(record, place, *damage)
            try:
                check_recover_record(damaged)
            except WrongStructure as error:
                assert str(error)
                refused += 1
                continue
            if damaged["source"]["run"] != record["source"]["run"]:
                # Checked by the reader, as run.json.
                continue
            used += 1
            # What does not make a plot, which takes a second, is made of each.
            description(damaged), headline(damaged), command_lines(damaged, "out")
            list(_origin(damaged))
            if damaged["evaluations"]:
                _evaluations(damaged)
    assert refused > 500 and used > 100


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("training", 1, "loss"), "x", r"damaged: training\[1\]\.loss is missing or not a number"),
        (("training", 1, "step"), 9, "damaged: training is not in the order of its steps"),
        (("evaluations", 4, "step"), 41, "damaged: evaluations goes beyond the last step"),
        (("evaluations", 1, "kl"), None, "damaged: evaluations has kl in some entries only"),
        (("best_step",), 3, "damaged: best_step is not among the evaluations"),
        (("written",), "first", "damaged: written is missing or not one of best, last"),
        (("movement", 1, "weights"), {"other": 1.0}, r"damaged: movement\[1\] has other matrices than the first block"),
        (("source", "run"), 3, "damaged: source.run is missing or not an object"),
        (("source", "run", "version"), 9, "source.run: version 9, but this barber_jax reads versions up to 2"),
        (("source", "run", "blocks"), None, "source.run: damaged: blocks is missing or not a list"),
        (("versions",), {}, "damaged: versions.barber_jax is missing"),
        (("tokens",), 2**70, "damaged: tokens is missing or not an integer"),
        (("version",), 2, "version 2, but this barber_jax reads version 1"),
        (("version",), True, "version True, but"),
        (("format",), "barber_jax.run", "not a record of barber_jax.recover"),
    ],
)
def test_the_message_names_the_place(tmp_path, place, value, says):
    write_recovered(tmp_path, changed(recover_json(), place, value))
    with pytest.raises(BarberError, match=rf"recover\.json: {says}"):
        read_recover_record(tmp_path)


def test_a_source_of_version_1_is_read_as_one_of_version_2(tmp_path):
    old = run_json()
    old["blocks"][0]["sub_blocks"][0]["apart_before"] = 0.5
    write_recovered(tmp_path, changed(recover_json(), ("source", "run"), {**old, "version": 1}))
    run = read_recover_record(tmp_path)["source"]["run"]
    assert run["version"] == 2 and run["blocks"][0]["sub_blocks"][0]["validation_loss_before"] == 0.5


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(BarberError, match=r"recover\.json: no such file; give a folder that barber_jax\.recover wrote"):
        read_recover_record(tmp_path)
    for content in ("", "{", "[]", "3", "[" * 9999, '{"format": "\\ud800"}'):
        (tmp_path / "recover.json").write_text(content)
        with pytest.raises(BarberError, match=r"recover\.json: not "):
            read_recover_record(tmp_path)


def test_hostile_files_end_in_one_line(tmp_path, capsys):
    write_recovered(tmp_path, recover_json(steps=10, perplexity=measured(3.0)))
    fuzz(tmp_path, files_of(tmp_path), ["recover.json"], lambda: read_recover_record(tmp_path), 200, capsys)


@pytest.mark.parametrize(
    "line",
    [
        ["--ckpt", "m", "--sparsity", "0.6", "--method", "sparsegpt", "--seed", "3"],
        ["--ckpt", "m", "--pattern", "2:4", "--preset", "best", "--eval-text", "a b.txt"],
        ["--ckpt", "m", "--masks", "x/masks.safetensors", "--pattern", "2:4", "--no-rebuild", "--refine", "3"],
    ],
    ids=["unstructured", "preset", "given masks"],
)
def test_the_pruning_command_is_known_from_its_record(line):
    config = PruneConfig.parse("barber_jax.prune", [*line, "--out", "pruned"])
    recorded = json.loads(
        json.dumps({**config.as_dict(), "sparsity": config.as_dict()["sparsity"] or 0.5}, default=str)
    )
    assert recorded_command(recorded) == config.command_line()
    assert recorded_command({**recorded, "samples": -1}) is None
