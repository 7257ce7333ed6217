"""The rooms of docs/contributing.md: each folder imports only what its `__init__.py` allows, and arrows go one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    *("console", "masks", "models", "data", "convert", "devices", "forward", "criteria", "stages", "run"),
    *("recovery", "reports", "eval"),
)
"""Lowest first; `eval` stands above the commands and the configuration at the top of barber_jax/."""
FOLDERS = {room: ROOT / room if room in ("convert", "eval") else ROOT / "barber_jax" / room for room in ROOMS}
TOP = sorted((ROOT / "barber_jax").glob("*.py"))


def imported(path: Path) -> dict[str, set[str]]:
    """Room, or module at the top, that a file imports from barber_jax -> the full names."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "barber_jax" and rest:
                found.setdefault(rest.partition(".")[0], set()).add(name)
    return found


def allowed(room: str) -> set[str]:
    """What the room's `__init__.py` says it may import."""
    docstring = ast.get_docstring(ast.parse((FOLDERS[room] / "__init__.py").read_text(encoding="utf-8")))
    assert docstring and docstring.splitlines()[0].startswith(f"{room.title()}: "), f"{room}: no sentence of purpose"
    (line,) = re.findall(r"^May import: (.*)\.$", docstring, re.MULTILINE)
    if room == "eval":
        assert line == "everything"
        return {*ROOMS, *(path.stem for path in TOP)}
    return set() if line == "nothing of this package" else set(line.split(", "))


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_go_one_way(room):
    may = allowed(room)
    if room != "eval":
        lower = set(ROOMS[: ROOMS.index(room)])
        assert may <= lower, f"{room} may import {may - lower}, which is not below it"
    for path in sorted(FOLDERS[room].glob("*.py")):
        for target, names in imported(path).items():
            # The version is everybody's.
            if target != "__version__" and target != room:
                assert target in may, f"{path.relative_to(ROOT)} imports {sorted(names)}; {room} may import {may}"


@pytest.mark.parametrize("path", TOP, ids=lambda path: path.stem)
def test_nothing_but_eval_imports_eval(path):
    assert "eval" not in imported(path)


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_of_a_room_names_its_modules(room):
    docstring = ast.get_docstring(ast.parse((FOLDERS[room] / "__init__.py").read_text(encoding="utf-8")))
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", docstring, re.MULTILINE))))
    there = {path.stem for path in FOLDERS[room].glob("*.py")} - {"__init__", "__main__"}
    assert there <= named, f"{room}: its table lacks {there - named}"


def test_every_folder_is_packaged():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f'"barber_jax.{room}"' in listed


def test_modules_are_small():
    sizes = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (ROOT / "barber_jax", *FOLDERS.values())
        for path in folder.glob("*.py")
    }
    assert len(sizes) > 60
    assert max(sizes.values()) <= 350, max(sizes, key=sizes.get)
    assert sum(lines > 300 for lines in sizes.values()) <= 0.05 * len(sizes)
