"""A study lists recovered runs beside pruned ones."""

import json

import pytest
from mutations import DAMAGE, changed
from recovered import measured, recover_json, run_json, write_masks, write_recovered

from barber_jax.console.errors import BarberError
from barber_jax.eval.agreement import agreement
from barber_jax.eval.runs import load_run, load_runs, text_titles
from barber_jax.eval.study import study
from barber_jax.eval.tables import measured_columns, runs_table, seeds_table


@pytest.fixture
def pruned(tmp_path):
    folder = tmp_path / "pruned"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run_json()))
    write_masks(folder)
    return folder


def columns(table):
    """Run -> header -> cell."""
    head, rows = table
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_recovered_runs_stand_beside_pruned_ones(pruned, tmp_path, drawn):
    folder = write_recovered(tmp_path / "recovered")
    runs = load_runs([pruned, folder])
    text = study(runs, tmp_path / "out")
    cells = columns(runs_table(runs))
    before, after = cells["pruned"], cells["recovered"]
    assert (before["recovered"], after["recovered"]) == ("", "40,000 tokens")
    assert (before["perplexity, held_out.txt"], after["perplexity, held_out.txt"]) == ("34.90", "28.25")
    assert before["sparsity"] == after["sparsity"] == "0.5000"
    # Seconds of both steps together.
    assert (before["seconds"], after["seconds"]) == ("60.0", "160.0")
    assert (before["tokens/s"], after["tokens/s"]) == ("", "500")
    assert (after["held-out loss before"], after["held-out loss recovered"]) == ("2.0000", "0.0488")
    # Options of the recovery are no options in which the two differ.
    assert not any(title.startswith(("--", "recover --")) for title in after)
    assert "| recovered | 40,000 tokens |" in text
    html = (tmp_path / "out" / "study.html").read_text()
    assert "40,000 tokens" in html and ">recovery<" in html
    content = json.loads((tmp_path / "out" / "study.json").read_text())
    one, other = content["runs"]
    assert "recovered" not in one and other["recovered"]["tokens"] == 40_000 and other["totals"]["pruned"] == 128
    assert content["agreement"][0]["pruned"]["jaccard"] == 1


def test_recoveries_differ_in_their_own_options_and_are_put_together_over_seeds(pruned, tmp_path):
    folders = []
    for seed, rate, perplexity in ((0, 0.002, 28.0), (1, 0.002, 30.0), (0, 0.004, 40.0)):
        content = recover_json(perplexity=measured(perplexity))
        content["options"] |= {"seed": seed, "rate": rate, "ckpt": f"pruned{seed}", "log_dir": f"{seed}"}
        folders.append(write_recovered(tmp_path / f"{seed}-{rate}", content))
    runs = load_runs([pruned, *folders])
    cells = columns(runs_table(runs))
    assert (cells["pruned"]["recover --rate"], cells["0-0.004"]["recover --rate"]) == ("", "0.004")
    assert cells["1-0.002"]["recover --seed"] == "1" and "recover --ckpt" not in cells["pruned"]
    head, (row,) = seeds_table(runs)
    assert (row[0], row[head.index("perplexity, held_out.txt")]) == ("2", "29.00 ± 1.41")


def test_a_recovered_run_whose_pruning_is_not_known(pruned, tmp_path):
    earlier = {"steps": 1, "tokens": 10, "seconds": 2.5}
    source = {"checkpoint": "someone/sparse", "run": None, "recovered": earlier}
    folder = write_recovered(tmp_path / "recovered", recover_json(source=source))
    runs = load_runs([pruned, folder])
    after = columns(runs_table(runs))["recovered"]
    assert (after["recovered"], after["seconds"], after["sparsity"]) == ("40,010 tokens", "102.5", "0.5000")
    # Of which model it is cannot be told, so its masks are not compared.
    assert "needs two pruned runs" in study(runs, tmp_path / "out")
    assert study(load_runs([folder]), tmp_path / "out")


def test_masks_are_those_of_the_recovered_folder(pruned, tmp_path):
    folder = write_recovered(tmp_path / "recovered")
    write_masks(folder, seed=1)
    ((_, _, overlap, _),) = agreement(load_runs([pruned, folder]))
    assert 0 < overlap.overall < 1


def test_recover_json_goes_before_run_json(pruned):
    # A converted folder has both.
    write_recovered(pruned, recover_json(perplexity=measured(3.0)))
    ((windows, value),) = load_run(pruned).perplexity.items()
    assert (windows.source, value) == ("texts/held_out.txt", 3.0)


def test_other_windows_of_a_text_are_another_column(pruned, tmp_path):
    recovered = write_recovered(tmp_path / "recovered", recover_json(perplexity=measured(3.0)))
    result = {"source": "texts/held_out.txt", "perplexity": 4.0, "windows": 4, "length": 32}
    (pruned / "perplexity.json").write_text(json.dumps({"results": [result]}))
    runs = load_runs([pruned, recovered])
    titles = text_titles(runs)
    assert "texts/held_out.txt (4 windows of 32)" in titles.values() and len(titles) == 2
    assert sum(column.title.startswith("perplexity, held_out.txt (") for column in measured_columns(runs)) == 2
    result |= {key: measured(3.0)[key] for key in ("windows", "length")}
    (pruned / "perplexity.json").write_text(json.dumps({"results": [result]}))
    assert list(text_titles(load_runs([pruned, recovered])).values()) == ["texts/held_out.txt"]


def test_damaged_options_are_refused_or_shown(pruned, tmp_path):
    content, sound = recover_json(), load_run(pruned)
    refused = 0
    for place in [("options", name) for name in content["options"]] + [("evaluations",), ("seconds",), ("source",)]:
        for damage in DAMAGE:
            write_recovered(tmp_path / "out", changed(content, place, damage))
            try:
                run = load_run(tmp_path / "out")
            except BarberError as error:
                assert "recover.json: damaged" in str(error)
                refused += 1
                continue
            runs_table([sound, run]), seeds_table([sound, run])
    assert refused > 20
