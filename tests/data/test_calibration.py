"""Calibration: every source, every refusal, and the sampling conventions, with a tokenizer made on the spot."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from barber_jax.console.errors import BarberError
from barber_jax.data import text
from barber_jax.data.calibration import load_calibration, load_ids
from barber_jax.data.windows import evaluation_ids

VOCAB = 1000
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9085657\n"


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_tokenizer(max_length: int = 8) -> PreTrainedTokenizerFast:
    """The word `w17` is id 17; any other word is id 0."""
    model = WordLevel({"[UNK]": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    # A tokenizer.json may carry a truncation of its own; a long text must survive it.
    backend.enable_truncation(max_length)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=max_length)


TOKENIZER = make_tokenizer()


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def calibrate(source, *, samples=2, length=4, seed=0, vocab_size=VOCAB, **options) -> np.ndarray:
    return load_calibration(
        str(source), lambda: TOKENIZER, samples=samples, length=length, seed=seed, vocab_size=vocab_size, **options
    )


def refused(source, match: str, **options) -> None:
    with pytest.raises(BarberError, match=match) as caught:
        calibrate(source, **options)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


def write_documents(folder: Path, kind: str, documents: list[str], field: str = "text") -> Path:
    """Documents in one of the formats, beside a field that is not text."""
    table = datasets.Dataset.from_dict({"number": list(range(len(documents))), field: documents})
    path = folder / f"documents.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind in ("stream.arrow", "file.arrow"):
        opened = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with opened(path, table.data.table.schema) as writer:
            writer.write_table(table.data.table)
    elif kind == "folder":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(path)
    return path


FORMATS = ["jsonl", "parquet", "stream.arrow", "file.arrow", "folder", "splits"]


# Reading text


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    documents = ["w1 w2", "", "naïve\u2028 \r\n text", "2020-01-01", "w1 w2"]
    assert text.read_documents(write_documents(tmp_path, kind, documents, "body"), "body") == documents


def test_txt_is_one_document_with_universal_newlines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff one\r\n\r\n twö \n\rthree\u2028\n".encode())
    assert text.read_documents(path) == [" one\n\n twö \n\nthree\u2028\n"]
    assert text.read_documents(path) == [path.read_text(encoding="utf-8-sig")]


def json_lines(documents) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress(json_lines("ab"), mtime=0)),
        ("c4-train.00000-of-01024.json", json_lines("ab")),
        ("array.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()),
        ("UPPER.JSONL", b"\xef\xbb\xbf" + json_lines("ab")),
        ("a.Jsonl.GZ", gzip.compress(b"\xef\xbb\xbf" + json_lines("ab"), mtime=0)),
    ],
)
def test_json_under_every_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert text.read_documents(tmp_path / name) == ["a", "b"]


def test_gzipped_txt(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo", mtime=0))
    assert text.read_documents(tmp_path / "a.txt.gz") == ["one\ntwo"]


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow"])
def test_folder_of_shards_is_read_in_the_order_of_names(tmp_path, kind):
    suffix = Path(f"a.{kind}").suffix
    for index, document in [(1, "b"), (0, "a")]:
        write_documents(tmp_path, kind, [document]).rename(tmp_path / f"train-0000{index}-of-00002{suffix}")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert text.read_documents(tmp_path) == ["a", "b"]
    # Where names tell splits apart, only train is read.
    write_documents(tmp_path, kind, ["held out"]).rename(tmp_path / f"test-00000-of-00001{suffix}")
    assert text.read_documents(tmp_path) == ["a", "b"]
    (tmp_path / "a.jsonl").write_bytes(json_lines("c"))
    refused(tmp_path, r"holds .*\.jsonl.* files; give one of them, or a folder of one kind")


def test_folder_without_the_split_train(tmp_path):
    write_documents(tmp_path, "parquet", ["held out"]).rename(tmp_path / "validation-00000-of-00001.parquet")
    refused(tmp_path, "no split 'train'")


def test_the_only_split_is_read_whatever_its_name(tmp_path):
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    assert text.read_documents(tmp_path / "d") == ["a"]


def test_name_with_pattern_characters_stands_for_itself(tmp_path):
    source = write_documents(tmp_path, "parquet", ["right"])
    (tmp_path / "a[1].parquet").write_bytes(source.read_bytes())
    write_documents(tmp_path, "parquet", ["wrong"]).rename(tmp_path / "a1.parquet")
    assert text.read_documents(tmp_path / "a[1].parquet") == ["right"]


def test_an_edited_file_is_not_read_from_a_cache(tmp_path):
    for content in (["first"], ["later"]):
        assert text.read_documents(write_documents(tmp_path, "parquet", content)) == content


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"ab\xe9", "not UTF-8 at byte 2"),
        ("a.csv", b"text\n", r"unknown suffix '\.csv'; give \.txt, \.jsonl.*write it as \.parquet: pandas\.read_csv"),
        ("a.md", b"text\n", r"unknown suffix '\.md'; give \.txt.*copy it to a \.txt"),
        ("a.parquet.gz", b"text\n", r"unknown suffix '\.gz'; give \.txt.*: decompress it"),
        # Not as plain text: it would be JSON that is calibrated on.
        ("a.ndjson", b"{}\n", r"unknown suffix '\.ndjson'; .*: rename it to \.jsonl"),
        ("a.jsonl.gz", b"text\n", "damaged or not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "damaged or not gzip"),
        ("a.json", b'[{"text": "a"}, 3]', "row 1 is not a JSON object"),
        ("a.json", b'[{"text": "a"},\n', "the array in it is not JSON"),
        ("a.json", b'{\n"text": "a"}\n', "line 1 is not JSON .*; write one object per line"),
        ("a.jsonl", b'{"text": null}\n', "every row is null"),
        ("a.parquet", LFS_POINTER, "Git LFS pointer.*git lfs pull"),
        ("a.jsonl", LFS_POINTER, "Git LFS pointer"),
        ("a.npy", LFS_POINTER, "Git LFS pointer"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', "line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"title": "a", "n": 1}\n', r"line 2: no field 'text' \(fields: title, n\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: field 'text' is not text"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1: field 'text' holds half"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "not UTF-8 at byte 10"),
        ("a.parquet", b"", "empty"),
        ("a.parquet", b"not parquet at all", "damaged"),
        ("a.arrow", b"not arrow at all", "damaged"),
    ],
)
def test_refused_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, match)


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_refused_fields(tmp_path, kind):
    path = write_documents(tmp_path, kind, ["a"], "body")
    refused(path, r"no field 'text' \(fields: number, body\)")
    refused(path, "field 'number' of row 0 is not text; name another with --text-field", text_field="number")


@pytest.mark.parametrize("kind", FORMATS)
def test_null_rows_are_left_out_and_counted(tmp_path, kind):
    path, said = write_documents(tmp_path, kind, [words(1, 5), None, words(5, 9), None]), []
    assert text.read_documents(path) == [words(1, 5), words(5, 9)]
    assert sorted(calibrate(path, say=said.append).ravel()) == list(range(1, 9))
    ids = evaluation_ids(lambda: TOKENIZER, path=path, say=said.append)
    np.testing.assert_array_equal(ids, range(1, 9))
    assert said == [f"{path}: left out 2 rows without text (null)"] * 2
    refused(path, r"8 tokens, .* \(2 rows are null\)", samples=3)


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_truncated_file_is_refused(tmp_path, kind, capfd):
    path = write_documents(tmp_path, kind, [words(1, 500)] * 20)
    path.write_bytes(path.read_bytes()[:-3000])
    refused(path, "damaged")
    assert "Failed to read" not in capfd.readouterr().err


def test_binary_and_invalid_utf8_columns_are_refused(tmp_path):
    binary = pa.array([b"a\xff"])
    invalid = pa.Array.from_buffers(pa.string(), 1, binary.buffers())
    for column, match in ((binary, "not text"), (invalid, "UTF-8|Utf8|UTF8")):
        table = pa.table({"text": column})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        refused(tmp_path / "a.arrow", match)


def test_refused_folders(tmp_path):
    refused(tmp_path, "not a folder of datasets.save_to_disk")
    # As the repository of a dataset has them.
    for name in (".git", "data"):
        (tmp_path / "repository" / name).mkdir(parents=True)
        (tmp_path / "repository" / name / "train.jsonl").touch()
    refused(tmp_path / "repository", "its files are in folders; give one of these, such as .*repository/data$")
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"left": one, "right": one}).save_to_disk(tmp_path / "two")
    refused(tmp_path / "two", r"no split 'train' \(splits: left, right\)")
    one.save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "state.json").write_text("{")
    refused(tmp_path / "broken", "damaged")


def test_no_rows_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "no rows")


def test_read_documents_refuses_a_missing_path(tmp_path):
    with pytest.raises(BarberError, match=r"gone\.txt: no such file"):
        text.read_documents(tmp_path / "gone.txt")


def test_tokenize_neither_truncates_nor_warns(capfd):
    ids = text.tokenize(make_tokenizer(max_length=8), words(1, 900))
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, np.arange(1, 900))
    assert "longer than" not in capfd.readouterr().err


# The Hub


def test_hub_documents_reads_the_downloaded_file(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, **options):
        asked.append((repo, file, options["repo_type"], options["revision"], options["local_files_only"]))
        return str(write_documents(tmp_path, "parquet", ["a", "b"], "sentence"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    documents = text.hub_documents("ptb", "test")
    assert (len(documents), documents[1], " ".join(documents)) == (2, "b", "a b")
    # What the cache holds is taken without asking the network.
    place = ("ptb-text-only/ptb_text_only", "penn_treebank/test/0000.parquet")
    assert asked == [(*place, "dataset", "refs/convert/parquet", True)]


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_unreachable_hub_is_one_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Port 9 of this host: refused at once, and no name is looked up.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(name, "cannot get .* from the Hub .*local file instead")


def test_unknown_hub_dataset_and_split():
    with pytest.raises(BarberError, match="known are c4, wikitext2, ptb"):
        text.hub_documents("pile", "train")
    with pytest.raises(BarberError, match="ptb: no split 'validation'; it has train, test"):
        text.hub_documents("ptb", "validation")


def serve(monkeypatch, documents):
    monkeypatch.setattr(text, "hub_documents", lambda name, split: documents if split == "train" else None)


def test_c4_draws_what_wanda_draws(monkeypatch):
    documents = [words(start, start + size) for start, size in [(1, 4), (10, 5), (20, 2), (30, 40), (100, 200)]]
    serve(monkeypatch, documents)
    random.seed(3)
    expected = []
    for _ in range(20):
        while True:
            ids = TOKENIZER(documents[random.randint(0, len(documents) - 1)], truncation=False)["input_ids"]
            if len(ids) > 4:
                break
        start = random.randint(0, len(ids) - 4 - 1)
        expected.append(ids[start : start + 4])
    np.testing.assert_array_equal(calibrate("c4", samples=20, seed=3), expected)


def test_c4_without_a_long_document_is_refused(monkeypatch):
    serve(monkeypatch, [words(1, 5), words(1, 3)])
    refused("c4", "no document longer than 4 tokens among 2 of 2 tried")
    serve(monkeypatch, [words(1, 3)] * 5000)
    monkeypatch.setattr("barber_jax.data.calibration._MAX_MISSES", 50)
    refused("c4", r"among \d\d of 5000 tried")


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_joined_datasets_give_windows_across_documents(monkeypatch, name):
    serve(monkeypatch, [words(start, start + 3) for start in range(1, 400, 3)])
    windows = calibrate(name, samples=30, length=7)
    assert (windows.shape, windows.dtype) == ((30, 7), np.int32)
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert len(set(windows[:, 0].tolist())) > 5


def test_joints_of_the_literature(monkeypatch):
    seen = []
    monkeypatch.setattr(text, "tokenize", lambda tokenizer, whole: seen.append(whole) or np.arange(9, dtype=np.int32))
    serve(monkeypatch, ["a", "b"])
    calibrate("wikitext2")
    calibrate("ptb")
    assert seen == ["a\n\nb", "a b"]


def test_joined_dataset_too_short(monkeypatch):
    serve(monkeypatch, [words(1, 5)])
    refused("ptb", "4 tokens, but a window of 4 needs more")


# Local text


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_local_windows_are_disjoint_pieces_of_the_text(tmp_path_factory, sizes, length, seed, data):
    starts = np.cumsum([1, *sizes])
    documents = [words(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    total = sum(sizes)
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    if total < length:
        refused(path, f"{total} tokens, but 1 samples of {length} need {length}", samples=1, length=length)
        return
    samples = data.draw(st.integers(1, total // length))
    windows = calibrate(path, samples=samples, length=length, seed=seed)
    assert windows.shape == (samples, length)
    # Ids are 1, 2, 3, ... in text order, so a contiguous piece counts up and a repeated id is an overlap.
    assert (np.diff(windows, axis=1) == 1).all()
    assert len(np.unique(windows)) == windows.size
    np.testing.assert_array_equal(windows, calibrate(path, samples=samples, length=length, seed=seed))


def test_seed_chooses(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(words(1, 900))
    serve(monkeypatch, [words(1, 900)])
    for source in (path, "c4", "wikitext2", "ptb"):
        first, again, other = (calibrate(source, samples=5, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_duplicate_documents_count_once(tmp_path):
    path = write_documents(tmp_path, "jsonl", [words(1, 5), words(1, 5), words(5, 9), words(1, 5)])
    assert sorted(calibrate(path).ravel()) == list(range(1, 9))
    refused(path, "8 tokens, but 3 samples of 4 need 12", samples=3)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(1, 9))
    refused(path, r"outside the model's vocabulary \[0, 6\)", vocab_size=6)


def test_unknown_source_lists_what_is_known():
    refused("wikitext3", r"neither a dataset \(c4, wikitext2, ptb\) nor a file; .*\.npy, \.txt, \.jsonl")


@pytest.mark.parametrize("option", ["samples", "length"])
def test_counts_below_one(option):
    with pytest.raises(BarberError, match=f"--{option} 0: it must be at least 1"):
        calibrate("c4", **{option: 0})


# Token ids on disk


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8])
def test_npy_gives_first_rows_and_columns_without_a_tokenizer(tmp_path, dtype):
    rows = np.arange(15, dtype=dtype).reshape(3, 5)
    np.save(tmp_path / "ids.npy", rows)

    def never():
        raise AssertionError("the tokenizer was asked for")

    source = str(tmp_path / "ids.npy")
    ids = load_calibration(source, never, samples=2, length=4, seed=0, vocab_size=100_000)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, rows[:2, :4])


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((2, 4), np.float32), "holds float32"),
        (np.zeros((2, 4), bool), "holds bool"),
        (np.zeros(8, np.int32), r"shape \(8,\) has 1 axes"),
        (np.zeros((0, 4), np.int32), "holds no ids"),
        (np.zeros((1, 4), np.int32), "1 rows, but --samples is 2"),
        (np.zeros((2, 3), np.int32), "3 columns, but --length is 4"),
        (np.array([[1, 2, 3, 4], [5, VOCAB, -1, 7]]), rf"id {VOCAB} at \[1, 1\] is outside"),
        (np.array([[1, 2, 3, -4], [5, VOCAB, -1, 7]]), r"id -4 at \[0, 3\] is outside"),
        (np.array([[1, 2, 3, 2**40]] * 2), rf"id {2**40} at \[0, 3\]"),
        (np.array([[None] * 4] * 2), "cannot be read as .npy of token ids: it holds Python objects"),
        # NumPy counts timedelta64 among the integers.
        (np.zeros((2, 4), "m8[s]"), "holds timedelta64"),
        (np.zeros((2, 4), "M8[s]"), "holds datetime64"),
        (np.zeros((2, 4), complex), "holds complex128"),
        (np.zeros((2, 4), "S1"), r"holds \|S1"),
        (np.zeros((2, 4), "V4"), r"holds \|V4"),
        (np.zeros((2, 4), [("id", "i4")]), r"holds \[\('id', '<i4'\)\]"),
    ],
)
def test_refused_arrays(tmp_path, array, match):
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    refused(tmp_path / "ids.npy", match)


def test_refused_npy_files(tmp_path):
    path = tmp_path / "ids.npy"
    refused(path, "no such file")
    np.save(path, np.zeros((2, 4), np.int32))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-5], whole.replace(b"(2, 4)", b"(2, 4")):
        path.write_bytes(content)
        refused(path, "cannot be read")
    with open(path, "wb") as handle:
        np.savez(handle, a=np.zeros(3))
    refused(path, "archive")


def test_importing_calibration_stays_light():
    heavy = "{'torch', 'jax', 'datasets', 'transformers'}"
    code = f"import sys, barber_jax.data.calibration; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_damaged_npy_header_is_refused_without_a_warning(tmp_path, recwarn):
    """NumPy warns of an overflow where the header's sizes multiply to more than 64 bits."""
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros((3, 16), np.int32))
    path.write_bytes(path.read_bytes().replace(b"(3, 16), }" + 20 * b" ", b"(9223372036854775807, 16), }  "))
    with pytest.raises(BarberError, match=r"cannot be read as \.npy"):
        load_ids(path)
    assert not recwarn.list
