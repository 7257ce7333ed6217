"""The one reader of JSON, YAML and TOML: every document is bounded in size, in depth and in what it unfolds to.

Nothing else in this package parses these formats (a test holds it to that), so a document from somebody else can
neither fill the memory nor end in a `RecursionError`, here or where it is used later.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from barber_jax.console.errors import BarberError
from barber_jax.console.files import check_fetched

MAX_BYTES = 64 * 2**20
"""Largest document that is read. The largest known are tokenizer.json of 35 MB."""
MAX_SETTINGS = 256 * 2**10
"""The same for YAML and TOML, which people write by hand, and which Python parses slowly."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects."""
MAX_ITEMS = 4_000_000
"""Most values and names in a document, each counted as often as it occurs: YAML's aliases repeat their value."""
MAX_CHARACTERS = 4 * MAX_BYTES
"""Most characters in all texts of a document together, counted in the same way."""
MAX_BITS = 8192
"""Longest integer. Python does not print one of more than 4300 digits, so no message could quote it."""
LONG_INTEGER = "an integer of more digits than are read"


SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape in JSON for half of a surrogate pair; the other half may follow."""


class _YAMLLoader(yaml.BaseLoader):
    """BaseLoader that refuses a key that stands twice in a mapping, as TOML does: one of the two would be ignored."""

    def construct_mapping(self, node, deep=False):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    what = f"{key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class DocumentError(ValueError):
    """A text is not of its format, or beyond the bounds; the message says what is wrong, in part of a line."""


def parse(text: str, kind: str = "json") -> Any:
    """Parse a text in JSON, YAML or TOML.

    Args:
        kind: `json`, `toml`, or `yaml`, of which every scalar stays text: YAML would read the pattern 2:4 as a number.

    Raises:
        DocumentError: it is not of this format, or too large or too deeply nested.
    """
    most = MAX_BYTES if kind == "json" else MAX_SETTINGS
    if len(text) > most:
        raise DocumentError(f"{len(text)} characters are more than the {most} that are read")
    if kind == "toml":
        _check_dotted_keys(text)
    try:
        if kind == "json":
            content = json.loads(text)
        elif kind == "toml":
            content = tomllib.loads(text)
        else:
            content = yaml.load(text, _YAMLLoader)
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DocumentError(LONG_INTEGER if "integer string conversion" in str(error) else str(error)) from None
    _check_bounds(content)
    return content


def read(path: Path, kind: str = "json") -> Any:
    """Read a file in JSON, YAML or TOML; `kind` as for `parse`.

    Raises:
        DocumentError: as `parse`, or it is not UTF-8.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        # Not stat: a pipe or /dev/zero has no size.
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DocumentError(f"larger than the {MAX_BYTES} bytes that are read")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 at byte {error.start}") from None
    parsed = parse(text, kind)
    if kind == "json" and SURROGATE.search(text) and not is_unicode(json.dumps(parsed, ensure_ascii=False)):
        # It could not be written again, into a report for example.
        raise DocumentError("a text with half of a surrogate pair")
    return parsed


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path, absent: str, remedy: str = "fetch it again") -> dict:
    """Read the JSON object in a file.

    Args:
        absent: message where there is no file.
        remedy: what to do where the file is damaged.

    Raises:
        BarberError: the file does not exist, is a Git LFS pointer, or is not a JSON object.
    """
    check_fetched(path)
    try:
        content = read(path)
    except FileNotFoundError:
        raise BarberError(absent) from None
    except (OSError, DocumentError) as error:
        raise BarberError(f"{path}: cannot be read as JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise BarberError(f"{path}: not a JSON object; {remedy}")
    return content


def _check_dotted_keys(text: str) -> None:
    """Raise `DocumentError` for a TOML key of very many parts: tomllib's memory grows with their square."""
    bare = re.sub(r"#[^\n]*", "", re.sub(r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', "", text))
    for piece in re.split(r"[\n=,{]", bare):
        if piece.count(".") > MAX_DEPTH:
            raise DocumentError(f"a key of more than {MAX_DEPTH} parts")


def _check_bounds(content: Any) -> None:
    """Raise `DocumentError` if a parsed document is too deep or too large."""
    level, depth, items, characters = [content], 0, 0, 0
    while level:
        items += len(level)
        depth += any(isinstance(value, dict | list) for value in level)
        if depth > MAX_DEPTH:
            raise DocumentError(f"nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, int) and value.bit_length() > MAX_BITS:
                # TOML's hexadecimal numbers have no limit of Python's.
                raise DocumentError(LONG_INTEGER)
            elif isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            if items + len(below) > MAX_ITEMS or characters > MAX_CHARACTERS:
                raise DocumentError("it unfolds to more values than are read")
        level = below
