"""The begin token in front of samples and windows: the ids, what a family makes of `auto`, and what is recorded."""

import json
import shutil

import numpy as np
import pytest
from cli import prune_masks
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from barber_jax.console.errors import BarberError
from barber_jax.data.begin import begin_id, settled
from barber_jax.data.calibration import load_calibration
from barber_jax.data.windows import cut_windows, evaluation_ids
from barber_jax.eval.perplexity import PerplexityConfig, evaluate

BEGIN = 1


def tokenizer(size=97, begin="<s>"):
    """Words w2, w3, ... are their numbers; the begin token is put at the start of a text."""
    backend = Tokenizer(WordLevel({"[UNK]": 0, "<s>": BEGIN} | {f"w{i}": i for i in range(2, size)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token=begin)


@pytest.fixture
def words(tmp_path):
    """A text file of the words w2 to w96."""
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in range(2, 97)))
    return path


EXPECTED = {
    "auto": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]],
    "always": [[1, 2, 3, 4, 5], [1, 6, 7, 8, 9]],
    "never": [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11]],
}


@pytest.mark.parametrize("choice", EXPECTED)
def test_evaluation_windows(words, choice):
    made = tokenizer()
    ids = evaluation_ids(lambda: made, path=words, begin=choice)
    windows = cut_windows(ids, 5, 2, "words", 97, begin_id(choice, lambda: made))
    assert windows.tolist() == EXPECTED[choice] and windows.dtype == np.int32


@pytest.mark.parametrize("choice", EXPECTED)
def test_calibration_samples(words, choice):
    made = tokenizer()
    rows = load_calibration(str(words), lambda: made, samples=19, length=5, seed=0, vocab_size=97, begin=choice)
    # All windows of the text, in an order that the seed gives.
    assert {tuple(row) for row in EXPECTED[choice]} <= {tuple(row) for row in rows.tolist()}
    assert (rows[:, 0] == BEGIN).sum() == {"auto": 1, "always": 19, "never": 0}[choice]


def test_token_ids_are_used_as_they_are(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(20).reshape(2, 10))
    rows = load_calibration(
        str(tmp_path / "ids.npy"), tokenizer, samples=2, length=5, seed=0, vocab_size=97, begin="always"
    )
    assert rows.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]


def test_a_tokenizer_without_one_is_refused(words):
    made = tokenizer(begin=None)
    with pytest.raises(BarberError, match="--begin-token always: the tokenizer has no begin token"):
        load_calibration(str(words), lambda: made, samples=2, length=5, seed=0, vocab_size=97, begin="always")
    assert load_calibration(str(words), lambda: made, samples=2, length=5, seed=0, vocab_size=97, begin="never").any()


def test_what_auto_means():
    assert [settled(choice, False) for choice in EXPECTED] == list(EXPECTED)
    assert [settled(choice, True) for choice in EXPECTED] == ["always", "always", "never"]


def test_gemma_relies_on_it_and_a_run_records_it(words, tiny, tmp_path):
    folder = shutil.copytree(tiny("gemma3_text"), tmp_path / "gemma")
    tokenizer().save_pretrained(folder)

    def measured(choice):
        (result,) = evaluate(PerplexityConfig(str(folder), length=16, text=(words,), begin_token=choice))
        return result

    always, never = measured("always"), measured("never")
    assert measured("auto") == always and always["begin_token"] == "always"
    assert never["begin_token"] == "never" and abs(never["nll"] - always["nll"]) > 1e-3
    options = ["--samples", 4, "--length", 16, "--no-rebuild", "--eval-text", words]
    prune_masks(tmp_path / "out", folder, words, *options)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["options"]["begin_token"] == "always"
    assert run["dense_perplexity"]["nll"] == pytest.approx(always["nll"], rel=1e-6)
