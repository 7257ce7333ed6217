"""The model card of a recovered result: tags, base model, both commands, perplexities, and the pruned model's card."""

import pytest
import yaml
from recovered import measured, recover_json, run_json

from barber_jax.reports.recover_card import recover_card, write_recover_card

PRUNED = "---\nlicense: apache-2.0\nbase_model: some/base\ntags:\n- wanda\n---\n\n# The pruned one\n\nIts story.\n"


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_tags_base_model_commands_and_perplexities():
    card = recover_card("model-2-4", recover_json())
    front = front_matter(card)
    assert front["base_model"] == "someone/model" and front["pipeline_tag"] == "text-generation"
    wanted = ["sparse", "pruned", "recovered", "llm-barber", "barber_jax", "wanda", "2:4", "distillation"]
    assert front["tags"] == wanted
    assert "python -m barber_jax.prune --ckpt someone/model --out pruned\n" in card
    assert "python -m barber_jax.recover --ckpt pruned --text 'my prose.txt' --out model-2-4\n" in card
    assert "| perplexity, held_out.txt, 7 windows of 64 | 17.50 | 34.90 | 28.25 |" in card
    assert "| sparsity of the decoder blocks | 0 | 0.5000 | 0.5000 |" in card
    assert "40 steps on 40,000 tokens, trained on the KL divergence to `someone/model` and 25% cross-entropy" in card


def test_the_pruned_models_card_is_kept_below(tmp_path):
    (tmp_path / "README.md").write_text(PRUNED, encoding="utf-8")
    write_recover_card(tmp_path, "out", recover_json())
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "apache-2.0" and front_matter(card)["base_model"] == "someone/model"
    assert card.index("# out") < card.index("Model card of the pruned model `pruned`") < card.index("Its story.")
    assert card.count("license: apache-2.0") == 1


@pytest.mark.parametrize(
    ("source", "run", "teacher", "wanted"),
    [
        (PRUNED, None, "some/teacher", "some/base"),
        ("", None, "some/teacher", "some/teacher"),
        ("", None, None, None),
        ("", run_json(ckpt="/data/private/model"), None, None),
        ("---\nbase_model: [a/b, c/d]\n---\n", None, None, None),
    ],
    ids=["card", "teacher", "unknown", "path", "several"],
)
def test_base_model_where_the_pruning_run_does_not_say(source, run, teacher, wanted):
    record = recover_json(source={"checkpoint": "pruned", "run": run}, commands={"recover": []})
    record["options"]["teacher"] = teacher
    card = recover_card("out", record, source)
    assert front_matter(card).get("base_model") == wanted
    assert "/data/private" not in card and "barber_jax.prune " not in card
    assert ("distillation" in front_matter(card)["tags"]) == (teacher is not None)


@pytest.mark.parametrize(("start", "cell"), [(measured(40.0), "40.00"), (None, "")])
def test_perplexities_that_were_not_measured_are_empty(start, cell):
    card = recover_card("out", recover_json(dense_perplexity=None, start_perplexity=start))
    assert f"windows of 64 |  | {cell} | 28.25 |" in card
    assert "| perplexity" not in recover_card("out", recover_json(perplexity=None))


def test_names_cannot_become_markup():
    evil = "a|b <script> `x`\n# heading"
    record = recover_json(perplexity={**measured(3.0), "source": evil}, source={"checkpoint": evil, "run": None})
    record["options"] |= {"teacher": evil, "scope": evil}
    record["pattern"] = evil
    card = recover_card(evil, record, "text")
    # What stands before the first block of code.
    text = card.split("```")[0].split("---\n")[2]
    assert "\n# heading" not in text and "a\\|b" in text
    assert all("\\<script" in line or "`a|b" in line for line in text.splitlines() if "<script" in line)
