"""The public Python API: docs/python.md does what it says, as written, and names are imported when they are used."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import barber_jax
from barber_jax.masks import read_masks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HEAVY = {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "torch", "transformers", "safetensors", "tyro", "rich"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which all examples have run, one after the other, and their names."""
    folder, names = tmp_path_factory.mktemp("page"), {}
    (folder / "tests").symlink_to(ROOT / "tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in enumerate(EXAMPLES):
            exec(compile(code, f"docs/python.md, example {number + 1}", "exec"), names)
    return folder, names


def test_the_examples_run_as_written(page):
    folder, names = page
    assert names["record"]["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert names["logits"].shape == (2, 32, names["description"].vocabulary)
    assert 1 - names["mask"].mean() == pytest.approx(0.5, abs=0.01)
    assert names["losses"][-1] < names["losses"][0] - 0.1
    assert names["made"].shape == names["drawn"].shape == (2, 16)
    np.testing.assert_allclose(names["sparse"]["kernel"], [[0.9, 0.0]] * 4, rtol=1e-6)
    assert names["result"]["windows"] > 0
    # What was fine-tuned has the masks that it had.
    assert (folder / "fine-tuned" / "masks.safetensors").read_bytes() == (
        folder / "pruned" / "masks.safetensors"
    ).read_bytes()
    tuned, file = barber_jax.open_checkpoint(str(folder / "fine-tuned")), read_masks(folder / "pruned")
    for name in file.names():
        assert not tuned.read(name)[~file.read(name)].any()


def test_fine_tuning_takes_twenty_lines():
    (code,) = (code for code in EXAMPLES if "nnx.Optimizer" in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert "barber_jax.load" in PAGE[: PAGE.index("nnx.Optimizer")]


def test_the_page_lists_the_public_names():
    table = PAGE[PAGE.index("| name |") : PAGE.index("## Pruning")]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"\b\w+\b", row.replace("(...)", ""))}
    assert listed == set(barber_jax.__all__) - {"__version__"}
    used = {
        node.attr
        for code in EXAMPLES
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "barber_jax"
    }
    assert listed - used == {"BarberError"}


def test_every_public_name_is_there():
    assert set(barber_jax.__all__) <= set(dir(barber_jax))
    for name in barber_jax.__all__:
        assert getattr(barber_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = barber_jax.unknown


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import barber_jax; dir(barber_jax)", set()),
        ("import barber_jax; barber_jax.BarberError", set()),
        ("import barber_jax; barber_jax.read_masks", {"numpy", "safetensors"}),
    ],
    ids=["package", "error", "masks"],
)
def test_imports_wait_until_they_are_needed(code, allowed):
    loaded = in_a_new_process(f"{code}; import sys; print(*sys.modules)").split()
    assert "barber_jax" in loaded
    assert HEAVY & set(loaded) <= allowed


@pytest.mark.parametrize(
    "before", ["", "import barber_jax.prune", "from barber_jax.prune import prune", "from barber_jax import prune"]
)
def test_prune_may_be_called_however_it_was_imported(before):
    code = f"{before}\nimport barber_jax\nassert callable(barber_jax.prune)\nprint(barber_jax.prune.prune.__name__)"
    assert in_a_new_process(code) == "prune"


def test_prune_says_what_it_takes():
    assert inspect.signature(barber_jax.prune) == inspect.signature(barber_jax.prune.prune)
    with pytest.raises(TypeError, match="config"):
        barber_jax.prune()
