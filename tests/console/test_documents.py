"""The one reader of JSON, YAML and TOML, and the values of options."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

from barber_jax.console import documents
from barber_jax.console.command import parse
from barber_jax.console.documents import MAX_DEPTH, DocumentError
from barber_jax.console.errors import BarberError
from barber_jax.console.values import check_values, typed, words

BOMB = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json", "[" * 100_000, "nested"),
        ("json", "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        ("json", '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        ("json", "1" * 5000, "more digits"),
        ("json", "{", "Expecting"),
        ("yaml", BOMB, "unfolds to more"),
        ("yaml", f"a: &a '{'x' * 200_000}'\nb: [{', '.join(['*a'] * 2000)}]", "unfolds to more"),
        ("yaml", "&a [*a]", "recursive"),
        ("yaml", "[" * 100_000, "nested"),
        ("yaml", "a: [", "expected"),
        ("yaml", "a: 1\nb: [{c: 1, d: 2, c: 3}]", "'c' stands there twice"),
        ("yaml", " " * documents.MAX_SETTINGS + "a", "more than"),
        ("toml", "a = " + "[" * 100_000, "nested"),
        ("toml", "a." * 50_000 + "a = 1", "more than 64 parts"),
        ("toml", '"\\"".' + "a." * 50_000 + '"b" = 1', "more than 64 parts"),
        ("toml", "x = {" + "a." * 50_000 + "a = 1}", "more than 64 parts"),
        ("toml", "= 3", "Invalid"),
        # Python limits the digits of decimal numbers alone; this one could be quoted in no message.
        ("toml", f"a = [0x{'f' * 5000}]", "more digits"),
    ],
)
def test_what_is_too_much_is_refused_at_once(kind, text, says):
    began = time.process_time()
    with pytest.raises(DocumentError, match=says):
        documents.parse(text, kind)
    assert time.process_time() - began < 10


def test_the_last_of_very_many_keys_stands_there_twice():
    """To count each of them among all others would take minutes."""
    mark = yaml.Mark("", 0, 0, 0, None, None)
    nodes = [yaml.ScalarNode("", name, mark) for name in [*map(str, range(60_000)), "59999"]]
    mapping = yaml.MappingNode("", [(node, node) for node in nodes], mark)
    began = time.process_time()
    with pytest.raises(yaml.YAMLError, match="'59999' stands there twice"):
        documents._YAMLLoader("").construct_mapping(mapping)
    assert time.process_time() - began < 10


def test_what_is_sound_is_read(tmp_path):
    deepest = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert documents.parse(deepest) == json.loads(deepest)
    # Scalars of YAML are text, so that 2:4 stays the pattern 2:4; an alias is what it stands for.
    assert documents.parse("a: &a [2:4, 0.5]\nb: *a", "yaml") == {"a": ["2:4", "0.5"], "b": ["2:4", "0.5"]}
    assert documents.parse(f"# {'.' * 99}\na.b = 'x{'.' * 99}'", "toml") == {"a": {"b": f"x{'.' * 99}"}}
    path = tmp_path / "a.json"
    path.write_text('"\\ud83d\\ude42 \\\\ud800"')
    assert documents.read(path) == "🙂 \\ud800"


@pytest.mark.parametrize(
    ("content", "says"), [(b'{"a": "\xff"}', "not UTF-8 at byte 7"), (b'["\\ud83d"]', "surrogate")]
)
def test_texts_that_could_not_be_written_again(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DocumentError, match=says):
        documents.read(tmp_path / "a.json")


def test_an_endless_file_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    with pytest.raises(DocumentError, match="larger than the 1000 bytes"):
        documents.read(Path("/dev/zero"))


def test_an_object_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(BarberError, match=r"^gone$"):
        documents.read_json(path, "gone")
    for content in ("[]", "3", "{"):
        path.write_text(content)
        with pytest.raises(BarberError, match=r"a\.json: .*JSON.*; fetch it again"):
            documents.read_json(path, "gone")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Some options."""

    number: int = 1
    rate: float | Literal["auto"] | None = None
    kind: Literal["a", "b"] | None = None
    on: bool = False
    text: Annotated[str, "note"] = ""
    path: Path | None = None
    several: tuple[Path, ...] = ()


def test_values_take_the_types_of_their_options():
    given = {
        "number": "3",
        "rate": "auto",
        "kind": "b",
        "on": "True",
        "text": "2:4",
        "path": "x",
        "several": ["a", "b"],
    }
    wanted = {**given, "number": 3, "on": True, "path": Path("x"), "several": (Path("a"), Path("b"))}
    assert typed(given, Options) == wanted
    assert typed({"rate": 0.5, "on": False, "several": "a"}, Options) == {
        "rate": 0.5,
        "on": False,
        "several": (Path("a"),),
    }
    line = words(wanted)
    assert parse(Options, "x", line) == Options(**wanted)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("text", ["x", "--out", "/somewhere", "--overwrite"], "--text .* it takes one value, not several"),
        ("path", {"a": "b"}, "it takes one value"),
        ("rate", ["0.1", "--on"], "it takes one value"),
        ("several", ["a", ["b"]], "it takes one value"),
        ("number", "x", "--number 'x': it must be an integer"),
        ("number", "1" * 31, "out of range"),
        ("number", True, "it must be a number"),
        ("rate", "fast", "choose one of auto"),
        ("kind", "c", "choose one of a, b"),
        ("on", "yes", "it must be true or false"),
        ("text", None, "it must be text or a number"),
        ("path", "a\0b", "null character"),
        ("several", ["a", "\udce9"], "not UTF-8"),
    ],
)
def test_values_that_do_not_fit(name, value, says):
    with pytest.raises(BarberError, match=says):
        typed({name: value}, Options)


def test_a_value_is_never_an_option():
    for name in ("text", "path"):
        with pytest.raises(BarberError, match="begins like an option"):
            words(typed({name: "--overwrite"}, Options))
    with pytest.raises(BarberError, match="begins like an option"):
        words(typed({"several": ["a", "--on"]}, Options))


def test_bounds_of_every_option(tmp_path, monkeypatch):
    with pytest.raises(BarberError, match=r"--number 1{31} is out of range"):
        parse(Options, "x", ["--number", "1" * 31])
    with pytest.raises(BarberError, match=r"--path .* is not UTF-8"):
        parse(Options, "x", ["--path", "o\udce9"])
    # In a folder whose name is not UTF-8.
    odd = tmp_path / "o\udce9"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(BarberError, match="is not UTF-8"):
        check_values({"path": Path("x")})
    check_values({"number": -1, "path": Path("/x"), "text": "ü", "on": True, "none": None})
