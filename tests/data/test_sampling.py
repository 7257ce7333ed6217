"""Large local texts: in bounded memory, by the seed alone, each document once; small ones as a whole."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import TOKENIZER, calibrate, refused, words

from barber_jax.data import lines, local, sampling, text
from barber_jax.data.windows import evaluation_ids


@pytest.fixture
def small(monkeypatch):
    """Texts of more than 200 characters are large, and are tokenized 400 characters at a time."""
    monkeypatch.setattr(sampling, "SMALL", 200)
    monkeypatch.setattr(sampling, "STRETCH", 400)
    monkeypatch.setattr(sampling, "_LONGEST_PIECE", 150)


def write(path, documents):
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def short_documents(count=99, size=10):
    """`count` documents, each of the next `size` words."""
    return [words(start, start + size) for start in range(1, count * size, size)]


def test_up_to_the_limit_the_text_is_tokenized_as_a_whole(tmp_path, monkeypatch):
    documents = short_documents(20)
    path = write(tmp_path / "a.jsonl", [*documents, documents[3]])
    ids = TOKENIZER("\n\n".join(documents), truncation=False)["input_ids"]
    wanted = np.reshape(ids[: len(ids) // 7 * 7], (-1, 7))[random.Random(5).sample(range(len(ids) // 7), 9)]
    # Duplicates and joints do not count.
    size = sum(map(len, documents))
    monkeypatch.setattr(sampling, "SMALL", size)
    np.testing.assert_array_equal(calibrate(path, samples=9, length=7, seed=5), wanted)
    monkeypatch.setattr(sampling, "SMALL", size - 1)
    assert (calibrate(path, samples=9, length=7, seed=5) != wanted).any()


@pytest.mark.usefixtures("small")
def test_a_seed_gives_the_same_ids_wherever_documents_stand(tmp_path):
    documents = short_documents()
    path, other = write(tmp_path / "a.jsonl", documents), write(tmp_path / "b.jsonl", [*documents[::-1], *documents])
    for seed in (0, 1, 10**40):
        given = calibrate(path, samples=9, length=30, seed=seed)
        np.testing.assert_array_equal(given, calibrate(other, samples=9, length=30, seed=seed))
        # Documents are whole, and none of them comes twice.
        starts = given.ravel()[::10]
        assert (starts % 10 == 1).all() and len(set(starts.tolist())) == starts.size
        np.testing.assert_array_equal(given.reshape(-1, 10), starts[:, None] + np.arange(10))
    assert (calibrate(path, samples=9, length=30, seed=0) != calibrate(path, samples=9, length=30, seed=1)).any()


@pytest.mark.usefixtures("small")
def test_every_document_is_as_likely(tmp_path):
    path, drawn = write(tmp_path / "a.jsonl", short_documents()), np.zeros(100, int)
    for seed in range(60):
        np.add.at(drawn, calibrate(path, samples=2, length=50, seed=seed).ravel() // 10, 1)
    # About 6 draws of each document, of 10 tokens.
    assert drawn[1:99].min() > 0 and drawn.max() < 200


@pytest.mark.usefixtures("small")
def test_all_of_a_large_text_can_be_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", short_documents())
    # Even where it has more characters for each token than are held at first.
    monkeypatch.setattr(sampling, "CHARACTERS_PER_TOKEN", 1)
    assert sorted(calibrate(path, samples=99, length=10).ravel()) == list(range(1, 991))
    refused(path, "990 tokens, but 100 samples of 10 need 1000", samples=100, length=10)


@pytest.mark.usefixtures("small")
def test_a_large_txt_is_cut_at_words(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(1, 999))
    windows = calibrate(path, samples=20, length=30, seed=1)
    assert len(np.unique(windows)) == windows.size and 0 not in windows
    # A piece is at most 16 characters for each token of a window, so that the 600 tokens come from several places.
    assert (np.diff(windows.ravel()) != 1).sum() >= 5


@pytest.mark.usefixtures("small")
def test_errors_of_a_large_file_are_found_wherever_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", short_documents())
    with open(path, "a") as handle:
        handle.write("{")
    refused(path, "line 100 is not JSON", samples=1)


@pytest.mark.usefixtures("small")
def test_evaluation_reads_a_large_text_in_order_and_no_further_than_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", short_documents())
    np.testing.assert_array_equal(evaluation_ids(lambda: TOKENIZER, path=path), range(1, 991))
    with open(path, "a") as handle:
        handle.write("{")
    np.testing.assert_array_equal(evaluation_ids(lambda: TOKENIZER, path=path, needed=90), range(1, 91))


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 20), st.integers(1, 9))
def test_pieces_are_the_text(whole, longest, block):
    blocks = [whole[start : start + block] for start in range(0, len(whole), block)]
    pieces = list(local.pieces(blocks, longest))
    assert "".join(pieces) == whole and max(map(len, pieces)) <= longest
    assert pieces == list(local.pieces(whole, longest))


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_blocks_of_a_txt_join_to_the_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\n\r日本\r\n\ufeff\r".encode())
    assert text.read_documents(path) == ["é\n\n日本\n\ufeff\n"]
    path.write_bytes("日本".encode()[:-1])
    refused(path, "not UTF-8 at byte 3")


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SMALL", 20_000)
    monkeypatch.setattr(text, "tokenize", lambda tokenizer, whole: np.ones(len(whole) // 5, np.int32))
    calibrate(write(tmp_path / "warm.jsonl", ["a " * 15_000]), samples=2, length=100)
    path = write(tmp_path / "a.jsonl", [f"{i} " + "word " * 100 for i in range(8000)])
    tracemalloc.start()
    calibrate(path, samples=2, length=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 4_000_000 and peak < 500_000
