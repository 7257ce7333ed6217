"""Text to train on: packed windows, what is held out, and batches in an order that depends on the seed alone."""

import json
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from test_calibration import TOKENIZER, VOCAB, words
from test_sampling import short_documents, write

from barber_jax.console.errors import BarberError
from barber_jax.data import calibration, packing, sampling, text


def packed(source, *, length=5, seed=0, held_out=2, needed=100, vocab_size=VOCAB, cache=None, **options):
    return packing.open_text(
        str(source),
        lambda: TOKENIZER,
        length=length,
        seed=seed,
        held_out=held_out,
        needed=needed,
        vocab_size=vocab_size,
        cache=cache,
        **options,
    )


def npy(tmp_path, ids, name="ids.npy"):
    np.save(tmp_path / name, ids)
    return tmp_path / name


def training(text):
    return np.array(list(text.windows)).reshape(-1, text.held_out.shape[1])


def rows(windows):
    return sorted(map(tuple, np.asarray(windows).tolist()))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.fixture
def small(monkeypatch):
    """Texts of more than 200 characters are large, and are tokenized 100 characters at a time."""
    monkeypatch.setattr(sampling, "SMALL", 200)
    monkeypatch.setattr(sampling, "STRETCH", 100)
    monkeypatch.setattr(sampling, "_LONGEST_PIECE", 150)


# Windows


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
@pytest.mark.parametrize("columns", [None, 20, 23])
def test_ids_are_cut_into_consecutive_windows(tmp_path, dtype, columns):
    ids = np.arange(7 * (columns or 20), dtype=dtype)
    whole = ids.reshape(7, columns)[:, :20].reshape(-1, 5) if columns else ids.reshape(-1, 5)
    text = packed(npy(tmp_path, ids if columns is None else ids.reshape(7, columns)), held_out=3)
    assert rows([*training(text), *text.held_out]) == rows(whole)
    assert text.windows[0].dtype == text.held_out.dtype == np.int32 and text.held_out.shape == (3, 5)
    assert text.tokens == 25 * 5


def test_text_is_tokenized_as_calibration_does(tmp_path):
    documents = short_documents(20)
    text = packed(write(tmp_path / "a.jsonl", [*documents, documents[3]]), length=7)
    ids = TOKENIZER("\n\n".join(documents), truncation=False)["input_ids"]
    assert rows([*training(text), *text.held_out]) == rows(np.reshape(ids[: len(ids) // 7 * 7], (-1, 7)))


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
@pytest.mark.usefixtures("small")
def test_a_dataset_is_used_whole(monkeypatch, name):
    monkeypatch.setattr(text, "hub_documents", lambda *_: short_documents())
    given = packed(name, needed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([training(given), given.held_out]).ravel()), range(1, 991))


def test_the_documents_of_c4_are_chosen(monkeypatch, small):
    monkeypatch.setattr(text, "hub_documents", lambda *_: short_documents())
    assert packed("c4", needed=50).tokens < 200 and packed("c4", needed=5000).tokens == 980


def test_null_rows_are_told(tmp_path, small):
    said = []
    packed(write(tmp_path / "a.jsonl", [words(1, 30), None, None]), say=said.append)
    packed(write(tmp_path / "b.jsonl", [*short_documents(), None]), say=said.append)
    assert [re.sub(".*: ", "", line) for line in said] == [
        "left out 2 rows without text (null)",
        "left out 1 row without text (null)",
    ]


# Held out


@pytest.mark.parametrize("source", ["small", "large", "ids"])
def test_held_out_windows_depend_on_the_seed_and_are_never_trained_on(tmp_path, monkeypatch, source):
    path = write(tmp_path / "a.jsonl", short_documents()) if source != "ids" else npy(tmp_path, np.arange(1, 991))
    if source == "large":
        for name, value in (("SMALL", 200), ("STRETCH", 100)):
            monkeypatch.setattr(sampling, name, value)
    held = {}
    for seed in (0, 1):
        for needed in (1, 100, 300, 10_000):
            text = packed(path, seed=seed, needed=needed, held_out=7)
            np.testing.assert_array_equal(held.setdefault(seed, text.held_out), text.held_out)
            # Each word comes once in the text.
            assert len(np.unique([*training(text), *text.held_out])) == text.tokens + 35
    assert (held[0] != held[1]).any()


# Large text


@pytest.mark.usefixtures("small")
def test_all_of_a_large_text_is_used_where_it_is_needed(tmp_path):
    documents = short_documents()
    text = packed(write(tmp_path / "a.jsonl", [*documents, *documents[::-1]]), length=1, needed=10_000)
    np.testing.assert_array_equal(np.sort(np.concatenate([training(text), text.held_out]).ravel()), range(1, 991))


@pytest.mark.usefixtures("small")
def test_of_a_large_text_little_more_than_needed_is_tokenized(tmp_path):
    path, before = write(tmp_path / "a.jsonl", short_documents()), set()
    for needed in (50, 200, 500, 800):
        text = packed(path, length=1, needed=needed)
        # A tenth, a stretch and a document more.
        assert needed <= text.tokens < 1.15 * needed + 40
        now = set(training(text).ravel().tolist())
        assert before <= now
        before = now


@pytest.mark.usefixtures("small")
def test_every_document_is_as_likely(tmp_path):
    path, drawn = write(tmp_path / "a.jsonl", short_documents()), np.zeros(100, int)
    for seed in range(60):
        np.add.at(drawn, np.array(list(packed(path, seed=seed, length=10, needed=200).windows)).ravel() // 10, 1)
    # About 12 draws of each document, of 10 tokens.
    assert drawn[1:99].min() > 20 and drawn[1:99].max() < 280


@pytest.mark.usefixtures("small")
def test_windows_in_a_file_are_those_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", short_documents())
    inside = packed(path, needed=500)
    monkeypatch.setattr(packing, "IN_MEMORY", 400)
    outside = packed(path, needed=500, cache=tmp_path / "new" / "cache")
    np.testing.assert_array_equal(training(inside), training(outside))
    (file,) = (tmp_path / "new" / "cache").iterdir()
    np.testing.assert_array_equal(np.load(file), training(inside))
    # Used again, unless it is damaged or holds other windows.
    written = file.stat().st_mtime_ns
    packed(path, needed=500, cache=file.parent)
    assert file.stat().st_mtime_ns == written
    for options in ({"seed": 1}, {"length": 4}, {"held_out": 3}, {"needed": 600}):
        changed = packed(path, **{"needed": 500, **options}, cache=file.parent)
        np.testing.assert_array_equal(training(changed), training(packed(path, **{"needed": 500, **options})))
    assert len(list(file.parent.iterdir())) == 5
    file.write_bytes(file.read_bytes()[:-9])
    np.testing.assert_array_equal(training(packed(path, needed=500, cache=file.parent)), training(inside))
    # Below the bound no file is written.
    packed(path, needed=50, cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", short_documents())
    monkeypatch.setattr(packing, "IN_MEMORY", 400)
    (tmp_path / "file").touch()
    with pytest.raises(BarberError, match=f"cannot write {tmp_path / 'file'}"):
        packed(path, needed=500, cache=tmp_path / "file")


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SMALL", 20_000)
    monkeypatch.setattr(sampling, "STRETCH", 20_000)
    monkeypatch.setattr(packing, "IN_MEMORY", 1000)
    monkeypatch.setattr(calibration, "_CHECKED_AT_ONCE", 10_000)
    monkeypatch.setattr(text, "tokenize", lambda tokenizer, whole: np.ones(len(whole) // 5, np.int32))
    packed(write(tmp_path / "warm.jsonl", ["a " * 15_000]), length=100, needed=10_000, cache=tmp_path)
    path = write(tmp_path / "a.jsonl", [f"{i} " + "word " * 100 for i in range(8000)])
    tracemalloc.start()
    given = packed(path, length=100, needed=10**6, cache=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 4 MB of text, of which 3.2 MB of ids are kept in a file.
    assert given.tokens > 750_000 and peak < 800_000


# Batches


def test_every_window_comes_once_in_an_epoch_each_in_another_order(tmp_path):
    text = packed(npy(tmp_path, np.arange(95)), held_out=2)
    drawn = np.concatenate(take(packing.batches(text, batch=4, seed=3), 17 * 4))
    epochs = drawn[: 17 * 16].reshape(16, 17, 5)
    assert all(rows(epoch) == rows(training(text)) for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) == 16


def test_the_order_depends_on_the_seed_alone(tmp_path):
    text = packed(npy(tmp_path, np.arange(500)))
    drawn = {seed: np.array(take(packing.batches(text, batch=8, seed=seed), 30)) for seed in (0, 1, 10**40)}
    for seed, given in drawn.items():
        np.testing.assert_array_equal(given, take(packing.batches(text, batch=8, seed=seed), 30))
        # In smaller batches too.
        halves = np.array(take(packing.batches(text, batch=4, seed=seed), 60))
        np.testing.assert_array_equal(given.reshape(-1, 5), halves.reshape(-1, 5))
    assert given.dtype == np.int32 and given.shape == (30, 8, 5)
    # No epoch of a seed is one of the next seed's.
    first, second = (drawn[seed].reshape(-1, 5)[: 2 * 98].reshape(2, -1) for seed in (0, 1))
    assert (first[:, None] != second[None]).any(-1).all()


@pytest.mark.parametrize("processes", [2, 3])
def test_rows_of_all_processes_are_the_batch_of_one(tmp_path, processes):
    text = packed(npy(tmp_path, np.arange(500)))
    whole = take(packing.batches(text, batch=6, seed=1), 40)
    each = [take(packing.batches(text, batch=6, seed=1, process=i, processes=processes), 40) for i in range(processes)]
    np.testing.assert_array_equal(whole, np.concatenate(each, axis=1))


@pytest.mark.parametrize("step", [0, 1, 15, 40])
def test_a_restored_position_goes_on_with_the_same_batches(tmp_path, step):
    text = packed(npy(tmp_path, np.arange(500)))
    wanted = packing.batches(text, batch=8, seed=1, process=1, processes=2)
    take(wanted, step)
    state = json.dumps(wanted.get_state())
    assert len(state) < 100
    restored = packing.batches(text, batch=8, seed=1, process=1, processes=2)
    take(restored, 3)
    restored.set_state(json.loads(state))
    np.testing.assert_array_equal(take(restored, 20), take(wanted, 20))


def test_grain_is_imported_where_it_is_used_and_says_nothing():
    code = (
        "import sys; import barber_jax.data.packing; assert not {'grain', 'jax'} & set(sys.modules); "
        "sys.modules['torch'] = sys.modules['tensorflow'] = None; import grain"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Refusals


@pytest.mark.parametrize(
    ("ids", "match", "options"),
    [
        (np.arange(14), r"14 tokens \(2 windows\), but 2 .* need 15; lower --length or --held-out", {}),
        (np.arange(3), r"3 tokens \(0 windows\), but 0 .* need 5;", {"held_out": 0}),
        (np.ones((3, 4), int), r"12 tokens \(0 windows\)", {}),
        (np.ones((2, 3, 4), int), r"shape \(2, 3, 4\) has 3 axes", {}),
        (np.array(1), r"shape \(\) has 0 axes", {}),
        (np.ones(20), "holds float64", {}),
        (np.array([*range(40), -1]), r"id -1 at \[40\] is outside", {}),
        (np.full((6, 20), 2**40), r"id 1099511627776 at \[0, 0\] is outside", {}),
        (np.arange(40), "--length 0: it must be at least 1", {"length": 0}),
        (np.arange(40), "--held-out -1: it must be at least 0", {"held_out": -1}),
    ],
)
def test_bad_ids_are_refused(tmp_path, ids, match, options):
    with pytest.raises(BarberError, match=match) as caught:
        packed(npy(tmp_path, ids), **options)
    assert "\n" not in str(caught.value)


def test_the_first_id_outside_of_a_large_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_CHECKED_AT_ONCE", 10)
    ids = np.zeros((9, 5), int)
    ids[7, 3] = ids[8, 0] = VOCAB
    with pytest.raises(BarberError, match=r"id 1000 at \[7, 3\]"):
        packed(npy(tmp_path, ids))
    with pytest.raises(BarberError, match=r"id 1000 at \[38\]"):
        packed(npy(tmp_path, ids.ravel()))


@pytest.mark.usefixtures("small")
def test_bad_text_is_refused(tmp_path):
    large = write(tmp_path / "a.jsonl", short_documents())
    with pytest.raises(BarberError, match=r"990 tokens \(9 windows\), but 9 windows of --length 110 .* need 1100;"):
        packed(large, length=110, held_out=9)
    with pytest.raises(BarberError, match=r"990 tokens \(9 windows\), but 20 windows"):
        packed(large, length=110, held_out=20)
    for options in ({"needed": 1}, {"needed": 10_000}):
        with pytest.raises(BarberError, match="outside the model's vocabulary"):
            packed(large, vocab_size=2, **options)
    with pytest.raises(BarberError, match="no field"):
        packed(large, text_field="body")
    with pytest.raises(BarberError, match="neither a dataset"):
        packed(tmp_path / "none")
    with pytest.raises(BarberError, match="no such file"):
        packed(tmp_path / "none.npy")


def test_batches_that_cannot_be_are_refused(tmp_path):
    text = packed(npy(tmp_path, np.arange(30)))
    with pytest.raises(BarberError, match=r"20 tokens to train on, but --batch 5 x --length 5 needs 25; lower --batch"):
        packing.batches(text, batch=5, seed=0)
    with pytest.raises(BarberError, match="--batch 3 must be a multiple of the number of processes, 2"):
        packing.batches(text, batch=3, seed=0, processes=2)
