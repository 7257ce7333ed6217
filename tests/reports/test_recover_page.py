"""report.html of a recovered checkpoint: what it holds, escaped, and that the command writes it again."""

import re

import numpy as np
import pytest
from mutations import changed
from recovered import recover_json, run_json, write_recovered

from barber_jax.console.errors import BarberError
from barber_jax.report import run as make_report
from barber_jax.reports.recover_page import headline, smoothed, written_step


def test_the_command_writes_the_page(tmp_path, capsys):
    folder = write_recovered(tmp_path / "run <1>")
    make_report([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    html = (folder / "report.html").read_text()
    assert "<h1>run &lt;1&gt;</h1>" in html and "run <1>" not in html
    # Loss, its parts, learning rate, gradient norm, movement.
    assert html.count("<figure") == 5
    for text in ("34.90 → 28.25", "perplexity, pruned → recovered, held_out.txt", "17.50", "40,000", "50%"):
        assert text in html
    for text in (
        "training",
        "held-out",
        "best, written",
        "optax version",
        "--teacher",
        "2:4",
        "Pruned from someone/model",
    ):
        assert text in html
    assert "python -m barber_jax.prune --ckpt someone/model --out pruned\n" in html
    assert (
        "python -m barber_jax.recover --ckpt pruned --text &#39;my prose.txt&#39; --out &#39;run &lt;1&gt;&#39;" in html
    )
    for address in re.findall(r'(?:href|src)=["\']([^"\']*)', html):
        assert address.startswith(("#", "data:"))
    assert "#0102" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    first = html
    make_report([str(folder)])
    assert (folder / "report.html").read_text() == first


def test_what_was_not_measured_is_left_out(tmp_path):
    absent = {"matmul_flops": None, "dense_perplexity": None, "start_perplexity": None, "perplexity": None}
    source = {"checkpoint": "pruned", "run": None}
    commands = {"recover": ["--ckpt", "pruned"]}
    record = recover_json(distilled=False, source=source, commands=commands, **absent)
    folder = write_recovered(tmp_path / "out", record)
    make_report([str(folder)])
    html = (folder / "report.html").read_text()
    assert html.count("<figure") == 4 and "perplexity" not in html and "KL" not in html
    assert "barber_jax.prune" not in html and "run.json is not known" in html
    assert "cross-entropy of the next token" in html


@pytest.mark.parametrize("written", ["best", "last"])
def test_which_weights_were_written(written):
    record = recover_json(best_step=10, written=written)
    assert written_step(record) == {"best": 10, "last": 40}[written]
    # Loss 2 / (step + 1).
    assert ({"best": "2 → 0.1818", "last": "2 → 0.04878"}[written], "held-out loss, start → written") in headline(
        record
    )


def test_a_run_that_was_recovered_before(tmp_path):
    earlier = {"steps": 7, "tokens": 2_500_000, "seconds": 30.0}
    source = {"checkpoint": "before", "run": run_json(), "recovered": earlier}
    folder = write_recovered(tmp_path / "out", recover_json(source=source))
    make_report([str(folder)])
    assert "Recovered before: 7 steps, 2.50 M tokens, 30.0 s." in (folder / "report.html").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"training": [], "evaluations": [], "movement": [], "steps": 0, "best_step": 0},
        {"evaluations": [], "steps": 1, "best_step": 1},
        {"movement": [{"block": 0, "weights": {"up": float("nan")}}, {"block": 1, "weights": {"up": float("inf")}}]},
    ],
    ids=["nothing trained", "nothing held out", "no movement that is a number"],
)
def test_odd_records_have_a_page(tmp_path, changes):
    record = recover_json(steps=1)
    if changes.get("steps") != 0:
        place = ("training", 0, "loss")
        record = changed(record, place, float("nan"))
    record = {**record, **changes}
    if "evaluations" in changes:
        record["tokens_per_second"] = 0.0
    folder = write_recovered(tmp_path / "out", record)
    make_report([str(folder)])
    assert "<h1>out</h1>" in (folder / "report.html").read_text()


def test_names_and_options_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    record = recover_json(source={"checkpoint": evil, "run": run_json(ckpt=evil, method=evil)})
    record["options"] |= {"ckpt": evil, "teacher": evil, evil: evil}
    record["commands"]["recover"] = [evil]
    record["device"]["kind"] = record["pattern"] = evil
    for each in record["movement"]:
        each["weights"][evil] = 0.5
    folder = write_recovered(tmp_path / "out", record)
    make_report([str(folder)])
    html = (folder / "report.html").read_text()
    assert "<script" not in html and html.count("&lt;script&gt;") > 8


def test_a_damaged_record_is_one_line(tmp_path):
    write_recovered(tmp_path, changed(recover_json(), ("steps",), -1))
    with pytest.raises(BarberError, match=r"recover\.json: damaged: steps is missing or not an integer of at least 0"):
        make_report([str(tmp_path)])


def test_smoothing_keeps_level_and_ends():
    np.testing.assert_allclose(smoothed([3.0] * 200), 3.0)
    # Fewer points than the window divides: they stay as they are.
    assert list(smoothed([1.0, 5.0, 2.0])) == [1.0, 5.0, 2.0]
    # Windows of 5 (100 points), by hand at both ends and in the middle; what is no number is left out.
    values = np.arange(100.0)
    values[50] = np.nan
    got = smoothed(values)
    assert got[[0, 1, 10, 50, 51, 99]].tolist() == [1, 1.5, 10, 50, 51.25, 98]
