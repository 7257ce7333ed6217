"""The ways to have the program: wheel, sdist, folder, editable, and a clone that is not installed. Each prunes once."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli import ORACLES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = ["--ckpt", ORACLES / "llama", "--calibration", ORACLES / "llama/calibration_ids.npy"]
RUN += ["--samples", 2, "--length", 16, "--compilation-cache", "off"]


def run(*line, cwd, check=True):
    """A process without this one's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What is committed or about to be, and nothing that a build has left."""
    folder = tmp_path_factory.mktemp("clone")
    names = ["barber_jax", "convert", "eval", "pyproject.toml", "README.md", "LICENSE"]
    skipped = ["--exclude=__pycache__", "--exclude=*.egg-info"]
    run("bash", "-c", f"tar -c {' '.join(skipped + names)} | tar -x -C {folder}", cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """A wheel and an sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, clone, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": [wheel], "sdist": [sdist]}


def python_with(arguments, folder):
    """A virtual environment that sees our dependencies, with the program installed by these arguments of pip."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    # A .pth file adds the packages there, but not what the .pth files there add: no editable installation of ours.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *arguments, cwd=folder)
    return python


def prunes(python, cwd, out, inside):
    """Whether the program prunes with the code that is inside a folder."""
    where = "import barber_jax.convert.export as a, barber_jax.eval.grid as b; print(a.__file__, b.__file__)"
    for path in run(python, "-c", where, cwd=cwd).stdout.split():
        assert Path(path).is_relative_to(inside), path
    done = run(python, "-m", "barber_jax.prune", *RUN, "--out", out, cwd=cwd)
    assert done.stderr.splitlines()[-1].startswith(f"{out}: sparsity 0.5")
    grids = (
        "import pathlib, barber_jax.eval.grid as g; print(len(list(pathlib.Path(g.__file__).parent.glob('grids/*'))))"
    )
    assert int(run(python, "-c", grids, cwd=cwd).stdout) > 5


@pytest.mark.parametrize("kind", ["wheel", "sdist", "folder", "editable"])
def test_installed(kind, clone, built, tmp_path):
    arguments = {**built, "folder": [clone], "editable": ["-e", clone]}[kind]
    environment = tmp_path / "environment"
    python = python_with(arguments, environment)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    prunes(python, elsewhere, tmp_path / "out", clone if kind == "editable" else environment)
    assert run(environment / "bin" / "barber-jax", "prune", "--help", cwd=elsewhere).stdout.startswith("usage:")
    if kind == "wheel":
        # In a clone's root the clone's own folder is found first, and all of it is used.
        prunes(python, clone, tmp_path / "from the clone", clone)


def test_a_clone_that_is_not_installed(clone, tmp_path):
    environment = tmp_path / "environment"
    python = python_with(["wheel"], environment)
    assert run(python, "-c", "import barber_jax", cwd=tmp_path, check=False).returncode != 0
    prunes(python, clone, tmp_path / "out", clone)
