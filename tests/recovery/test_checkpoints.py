"""Checkpoints of an unfinished recovery: what is kept, and what is told of libraries' lost tasks."""

import gc
import json
import logging
import sys
import types
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from barber_jax.console.errors import BarberError
from barber_jax.console.quiet import ignore_lost_tasks
from barber_jax.recovery.checkpoints import Checkpoints, DamagedRun
from barber_jax.recovery.training import State

IDENTITY = {"--rate": 0.1}


def state(value, step):
    moments = ({"a": jnp.full((2, 3), value + 1)}, jnp.int32(step))
    return State({"a": jnp.full((2, 3), float(value))}, moments, jnp.int32(step))


def test_what_is_kept_and_restored(tmp_path):
    with Checkpoints.create(tmp_path / "run", IDENTITY, overwrite=False) as checkpoints:
        assert checkpoints.steps() == []
        for step in range(4):
            checkpoints.save(step, state(step, step), {"log": step}, keep={1})
            assert checkpoints.steps() == sorted({step} | ({1} if step >= 1 else set()))
        # A step that is there already is as it was.
        checkpoints.save(3, state(7, 3), {"log": 7}, keep={1})
    with Checkpoints.resume(tmp_path / "run", IDENTITY) as checkpoints:
        for step in (1, 3):
            found, progress = checkpoints.restore(step, state(0, 0))
            assert progress["log"] == step and int(found.step) == step
            np.testing.assert_array_equal(found.values["a"], np.full((2, 3), step))
            np.testing.assert_array_equal(found.optimizer[0]["a"], np.full((2, 3), step + 1))
            assert int(found.optimizer[1]) == step
        with pytest.raises(DamagedRun, match="run/3: damaged"):
            checkpoints.restore(3, State({"b": jnp.zeros(2)}, (jnp.zeros(3),), jnp.int32(0)))
        checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "value"), [("log", {"best_step": 1}), ("text", None), ("digest", ""), ("sums", {}), ("log", [1])]
)
def test_a_changed_progress_is_not_taken(tmp_path, entry, value):
    """Arrays as they were, but another position in the text, or another best step: it must not go on from there."""
    with Checkpoints.create(tmp_path / "run", IDENTITY, overwrite=False) as checkpoints:
        checkpoints.save(1, state(1, 1), {"log": {"best_step": 0}, "text": {"next": 7}}, keep=set())
    (path,) = (path for path in (tmp_path / "run/1/progress").iterdir() if b"best_step" in path.read_bytes())
    content = json.loads(path.read_text())
    content.pop(entry)
    path.write_text(json.dumps(content if value is None else content | {entry: value}))
    with (
        Checkpoints.resume(tmp_path / "run", IDENTITY) as checkpoints,
        pytest.raises(DamagedRun, match=r"run/1: damaged \("),
    ):
        checkpoints.restore(1, state(0, 0))


def test_what_is_in_the_way(tmp_path):
    with Checkpoints.create(tmp_path / "run", IDENTITY, overwrite=False) as checkpoints:
        checkpoints.save(0, state(0, 0), {}, keep=set())
    with pytest.raises(BarberError, match="--resume continues it, --overwrite starts over"):
        Checkpoints.create(tmp_path / "run", IDENTITY, overwrite=False)
    with pytest.raises(BarberError, match=r"--rate was 0\.1 in the run under .*, now 0\.2"):
        Checkpoints.resume(tmp_path / "run", {"--rate": 0.2})
    Checkpoints.create(tmp_path / "run", IDENTITY, overwrite=True).close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["identity.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "7").write_text("mine")
    with pytest.raises(BarberError, match="is not an unfinished run"):
        Checkpoints.create(tmp_path / "mine", IDENTITY, overwrite=True)
    assert (tmp_path / "mine" / "7").read_text() == "mine"
    with pytest.raises(BarberError, match="no unfinished run under"):
        Checkpoints.resume(tmp_path / "none", IDENTITY)


def test_a_coroutine_that_is_left_says_nothing_at_its_end(monkeypatch):
    """As one of Orbax's, which makes an error with the whole specification of its array of being closed."""

    @types.coroutine
    def wait():
        yield

    async def read():
        try:
            await wait()
        except GeneratorExit as error:
            raise ValueError("while reading array index") from error

    def leave():
        coroutine = read()
        coroutine.send(None)
        del coroutine
        gc.collect()

    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    leave()
    assert len(heard) == 1
    ignore_lost_tasks()
    leave()
    assert len(heard) == 1


def test_other_errors_are_still_told(monkeypatch, caplog):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    ignore_lost_tasks()
    ignore_lost_tasks()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("no memory"), ValueError("loop is closed")):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error, object=None))
    assert [str(each.exc_value) for each in heard] == ["no memory", "loop is closed"]
    with caplog.at_level(logging.ERROR):
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: ...")
        logging.getLogger("asyncio").error("socket.send() raised")
    assert [record.getMessage() for record in caplog.records] == ["socket.send() raised"]
