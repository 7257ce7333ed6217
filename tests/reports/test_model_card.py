"""The model card of a result: the Hub's form, and the source's own card kept."""

import json
import shutil

import pytest
import yaml
from cli import prune_masks

from barber_jax.convert import __main__ as converter
from barber_jax.reports.model_card import model_card, split_card

SOURCE = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- chat\n---\n\n# The dense one\n\nIts story.\n"


def record(ckpt="someone/model", **changes):
    options = {"ckpt": ckpt, "method": "wanda", "masks": None, "sparse_ckpt": None, "pattern": "2:4", "rebuild": True}
    options |= {"granularity": "output1", "alpha": 0.01, "refine": 0, "reconstruct": 0, "samples": 4, "length": 16}
    content = {"options": options, "totals": {"sparsity": 0.5}, "versions": {"barber_jax": "9.9"}}
    return content | changes


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_is_the_hubs():
    front = front_matter(model_card("model-2-4", record(), ["--ckpt", "someone/model"]))
    assert front["base_model"] == "someone/model" and front["library_name"] == "transformers"
    assert {"sparse", "pruned", "llm-barber", "wanda", "2:4"} <= set(front["tags"])
    assert "license" not in front


def test_the_sources_card_is_kept_below_and_its_licence_above():
    card = model_card("out", record(), [], SOURCE)
    assert front_matter(card)["license"] == "apache-2.0" and front_matter(card)["language"] == ["en"]
    assert card.index("# out") < card.index("# The dense one") and "Its story." in card
    assert card.count("license: apache-2.0") == 1 and "chat" not in front_matter(card)["tags"]


def test_a_path_is_no_base_model():
    card = model_card("out", record("/data/private/model"), ["--sparsity", "0.5"])
    assert "base_model" not in front_matter(card)
    assert "/data/private" not in card and "`model` with 50.0%" in card


@pytest.mark.parametrize("measured", [True, False])
def test_perplexities_side_by_side(measured):
    found = {"source": "texts/held_out.txt", "perplexity": 30.123, "windows": 7, "length": 64}
    extra = {"perplexity": found} | ({"dense_perplexity": {**found, "perplexity": 20.456}} if measured else {})
    card = model_card("out", record(**extra), [])
    row = next(line for line in card.splitlines() if line.startswith("| perplexity"))
    assert row == f"| perplexity, held_out.txt, 7 windows of 64 | {'20.46' if measured else ''} | 30.12 |"


@pytest.mark.parametrize("text", ["", "# Plain", "---\n[\n---\nrest", "---\n- a\n---\nrest", "--- no front matter"])
def test_odd_cards_are_split_without_loss_of_text(text):
    entries, below = split_card(text)
    assert entries == {} and below.strip() in ("", "# Plain", "rest", "--- no front matter")
    assert below in model_card("out", record(), [], text) or not below.strip()


def test_a_run_writes_it_and_a_conversion_carries_it(tiny, tiny_ids, tmp_path):
    source = shutil.copytree(tiny(), tmp_path / "dense")
    (source / "README.md").write_text(SOURCE, encoding="utf-8")
    out = tmp_path / "out"
    prune_masks(out, source, tiny_ids, "--samples", 4, "--length", 16, "--no-rebuild", "--pattern", "2:4")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Its story." in card and front_matter(card)["license"] == "apache-2.0" and "--pattern 2:4" in card
    assert (source / "README.md").read_text(encoding="utf-8") == SOURCE
    assert json.loads((out / "run.json").read_text())["options"]["pattern"] == "2:4"
    converter.run(["--ckpt", str(out), "--out", str(tmp_path / "orbax"), "--format", "orbax"])
    assert (tmp_path / "orbax" / "README.md").read_text(encoding="utf-8") == card
