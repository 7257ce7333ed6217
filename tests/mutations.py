"""Damaged copies of files, from a seed, and what a reader must do with each of them."""

import contextlib
import copy
import json
import random
import re
import shutil
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from barber_jax.console.errors import MAX_LINE, BarberError

Files = dict[str, bytes]
"""Path in a folder -> content."""

SEED = 20
MAX_SECONDS = 30
"""An input that takes longer is a fault."""
NUMBERS = (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
RAW = ("NaN", "-Infinity", "1e400", "1" * 400, "9" * 5000, '"\\ud800"', "[" * 100 + "]" * 100, "-0", "1e-320", "1e300")
"""Values that are written into JSON as they stand."""
VALUES = (
    *(None, True, False, "", "x", "../../x", "<b>", "\x00\n\x1b[2J", "ü" * 3000, "nan", "1", [], {}, [[]], {"": 0}),
    *(-1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e9, 1e300, 1e-300, 10**18, 10**40, [1] * 50, {"a": None}, [None]),
)


DAMAGE = (None, True, -1, 1.5, 10**30, float("nan"), "x", [], {"a": 1})
"""Values with which each value of a record is replaced in turn."""


class TookTooLong(BaseException):
    """Not an Exception, so that no reader takes it for a complaint about its file."""


def places(content, above=()):
    """Path of every value in a document."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def changed(content, place, *value):
    """A copy of a document with another value at a place, or with none."""
    copied = json.loads(json.dumps(content))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    if value:
        inner[place[-1]] = value[0]
    else:
        del inner[place[-1]]
    return copied


def damaged(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A copy with one to three of: flipped bits, a cut, a splice, a length field, a number, a lost piece."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice((_flip, _flip, _cut, _splice, _length, _digits, _piece))(content, rng, other)
    return content


def _place(content: bytes, rng: random.Random) -> int:
    # Mostly near the start or the end, where headers are.
    near = rng.choice((64, 4096, len(content)))
    at = rng.randrange(max(1, min(near, len(content))))
    return at if rng.random() < 0.8 else max(0, len(content) - 1 - at)


def _flip(content: bytes, rng: random.Random, _) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 30)) if content else 0):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random, _) -> bytes:
    return content[: _place(content, rng)]


def _splice(content: bytes, rng: random.Random, other: bytes) -> bytes:
    other = other or content
    start, at = _place(other, rng), _place(content, rng)
    piece = other[start : start + rng.choice((1, 8, 100, 1000))]
    return content[:at] + piece + content[at + rng.choice((0, len(piece))) :]


def _length(content: bytes, rng: random.Random, _) -> bytes:
    form = rng.choice(("<I", "<Q", ">I", ">Q", "<H", "<d"))
    at, size = _place(content, rng) // 4 * 4, struct.calcsize(form)
    value = rng.choice((float("nan"), 1e308)) if form == "<d" else rng.choice(NUMBERS) % 256**size
    return content[:at] + struct.pack(form, value) + content[at + size :]


def _digits(content: bytes, rng: random.Random, _) -> bytes:
    start = _place(content, rng)
    found = re.compile(rb"\d+").search(content, start) or re.compile(rb"\d+").search(content)
    if not found:
        return content
    new = rng.choice((*map(str, NUMBERS), "-1", "1" * 400, "9" * 5000, "1e999", "0x10", "١"))
    return content[: found.start()] + new.encode() + content[found.end() :]


def _piece(content: bytes, rng: random.Random, _) -> bytes:
    at, size = _place(content, rng), rng.choice((1, 4, 50, 500))
    return content[:at] + content[at : at + size] * rng.choice((0, 2, 20)) + content[at + size :]


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON document with one to three values replaced, removed, doubled, swapped or renamed."""
    document, raw = json.loads(content), {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = [parent[key], parent[key]]
        elif kind == 2:
            other, there = rng.choice(places)
            parent[key] = json.loads(json.dumps(other[there])) if there in range(len(other)) or there in other else {}
        elif kind == 3 and isinstance(parent, dict):
            parent[rng.choice(("", "x", f"{key}x", "\ud800", "format"))] = parent.pop(key)
        elif kind == 4:
            mark = f"@{len(raw)}@"
            raw[json.dumps(mark)] = rng.choice(RAW)
            parent[key] = mark
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(document)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    return text.encode()


def _places(document) -> Iterator[tuple]:
    """Container and key of every value in a document."""
    level = [document]
    while level:
        value = level.pop()
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield value, key
                level.append(value[key])


def damaged_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header has its values changed, and the right length again."""
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    metadata = json.loads(header).get("__metadata__")
    if metadata and rng.random() < 0.5:
        nested = [key for key, text in metadata.items() if text.startswith(("{", "["))]
        if nested:
            key, whole = rng.choice(nested), json.loads(header)
            # Half of a surrogate pair is no text that a header can hold.
            whole["__metadata__"][key] = damaged_json(metadata[key].encode(), rng).decode()
            changed = json.dumps(whole).encode()
            return len(changed).to_bytes(8, "little") + changed + content[8 + size :]
    changed = damaged_json(header, rng)
    return len(changed).to_bytes(8, "little") + changed + content[8 + size :]


def mutate(files: Files, names: list[str], rng: random.Random) -> Files:
    """The files with one of those named damaged, in a way that suits its format."""
    name, other = rng.choice(names), files[rng.choice(list(files))]
    content = files[name]
    if name.endswith(".json") and rng.random() < 0.7:
        content = damaged_json(content, rng)
    elif name.endswith(".safetensors") and rng.random() < 0.5:
        content = damaged_header(content, rng)
    else:
        content = damaged(content, rng, other)
    return {**files, name: content}


def files_of(folder: Path) -> Files:
    """All files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fuzz(
    folder: Path,
    files: Files,
    names: list[str],
    read: Callable[[], object],
    count: int,
    capture: pytest.CaptureFixture,
    *,
    fresh: bool = False,
) -> None:
    """Give a reader `count` damaged inputs; fail with seed and index of each that does not end as it must.

    It must succeed or raise `BarberError` with one line of moderate length, within seconds, and print nothing.

    Args:
        folder: where the files are; written to.
        files: the sound files.
        names: those that are damaged, one for each input.
        read: reads the folder.
        fresh: the reader changes the folder, so it is written anew for each input.
    """
    faults, ends = [], {"read": 0, "refused": 0}
    with _limit():
        for index in range(count):
            inputs = mutate(files, names, random.Random(f"{SEED} {index}"))
            _write(folder, inputs, fresh)
            if fault := _fault(read, capture, ends):
                faults.append(f"seed {SEED}, index {index}: {fault}")
            if not fresh:
                _write(folder, {name: files[name] for name in names if inputs[name] is not files[name]}, False)
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults[:20])
    # Neither all refused nor all taken: then nothing would have been tried.
    assert all(ends.values()), ends


def _write(folder: Path, files: Files, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        if fresh:
            path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not path.is_file() or path.read_bytes() != content:
            # A new file: the old one may still be mapped.
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def _fault(read: Callable[[], object], capture: pytest.CaptureFixture, ends: dict[str, int]) -> str | None:
    """What a reader did wrong with an input, or None."""
    message, started = "", time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read()
                ends["read"] += 1
            except BarberError as error:
                message = str(error)
                ends["refused"] += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(at.filename).name}:{at.lineno}" for at in where if "barber_jax" in at.filename][-3:]
        capture.readouterr()
        return f"{type(error).__name__}: {str(error)[:300]} ({' '.join(ours)}; {time.monotonic() - started:.0f} s)"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    out, err = capture.readouterr()
    if warned:
        return f"warning {warned[0].category.__name__}: {warned[0].message}"
    if out or err:
        return f"it printed {(out + err)[:300]!r}"
    if len(message.splitlines()) > 1 or len(message) > MAX_LINE:
        return f"message of {len(message)} characters, {len(message.splitlines())} lines: {message[:200]!r}"
    return None


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
