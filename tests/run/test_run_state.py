"""Run state: what was committed comes back, whatever happened to the process or to the disk in between."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from barber_jax.console.errors import BarberError
from barber_jax.run.block_file import NAME
from barber_jax.run.identity import IDENTITY, MAX_NAMED
from barber_jax.run.run_state import ITEM, RunState

RUN = {"--alpha": 0.1, "--method": "wanda", "--rebuild": True, "--batch": None, "content of --ckpt x": "0123abcd" * 4}
DTYPES = [np.bool_, np.uint8, np.float16, ml_dtypes.bfloat16, np.float32]


def block(index, size=1000):
    """Arrays and record of a block, always the same ones."""
    rng = np.random.default_rng(index)
    content = {f"weight/layers.{n}.kernel": rng.integers(0, 256, (size, 4), np.uint8) for n in range(3)}
    content = {name: array.view(dtype) for (name, array), dtype in zip(content.items(), DTYPES[1:], strict=False)}
    return content, {"block": index, "loss": 1 / (index + 3), "sub_blocks": [{"name": "attention"}]}


def assert_same(given, wanted):
    assert given[1] == wanted[1]
    assert list(given[0]) == list(wanted[0])
    for name, array in wanted[0].items():
        assert given[0][name].dtype == array.dtype and given[0][name].shape == array.shape
        assert given[0][name].tobytes() == array.tobytes()


def assert_holds(state, finished, size=1000):
    assert state.finished == finished
    for index in range(finished):
        assert_same(state.load(index), block(index, size))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.run"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run state with three blocks, not to be changed."""
    folder = tmp_path_factory.mktemp("three") / "out.run"
    with RunState.create(folder, RUN) as state:
        for index in range(3):
            state.commit(index, *block(index))
    return folder


@pytest.fixture
def spoilt(three, folder):
    """A copy of it to spoil."""
    return shutil.copytree(three, folder)


# What was committed comes back


stored_arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(np.uint8, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)).map(
        lambda bits: bits.astype(np.bool_) if dtype == np.bool_ else np.repeat(bits[..., None], 4, -1).view(dtype)
    )
)
records = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text())


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), stored_arrays, max_size=4), records)
def test_every_dtype_shape_and_name_comes_back(content, record):
    with tempfile.TemporaryDirectory() as place:
        with RunState.create(Path(place) / "run", RUN) as state:
            state.commit(0, content, record)
            assert_same(state.load(0), (content, record))
        with RunState.resume(Path(place) / "run", RUN) as state:
            assert state.finished == 1 and state.damaged is None
            assert_same(state.load(0), (content, record))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_in_any_memory_order_come_back(folder, dtype):
    content = np.arange(24).reshape(4, 6).astype(dtype)
    given = {"a.b": content.T, "c": content[::2, 1:], "d": np.asfortranarray(content), "e": np.array(1, dtype)}
    with RunState.create(folder, RUN) as state:
        state.commit(0, given, {})
        assert_same(state.load(0), (given, {}))


def test_resume_goes_on(three, spoilt):
    with RunState.resume(spoilt, RUN) as state:
        assert state.damaged is None
        assert_holds(state, 3)
        state.commit(3, *block(3))
    with RunState.resume(spoilt, RUN) as state:
        assert_holds(state, 4)


def test_steps_are_orbax_steps_with_a_block_each(three):
    assert {path.name for path in three.iterdir()} == {IDENTITY, "0", "1", "2"}
    sizes = [(three / str(index) / ITEM / NAME).stat().st_size for index in range(3)]
    assert max(sizes) < 1.1 * min(sizes)


def test_blocks_are_committed_in_order_and_only_finished_ones_loaded(folder):
    with RunState.create(folder, RUN) as state:
        for wrong in (1, -1):
            with pytest.raises(ValueError):
                state.commit(wrong, *block(0))
        state.commit(0, *block(0))
        with pytest.raises(ValueError):
            state.commit(0, *block(0))
        for wrong in (1, -1):
            with pytest.raises(ValueError):
                state.load(wrong)
        assert_holds(state, 1)


def test_remove_leaves_nothing_and_closing_again_is_harmless(spoilt):
    with RunState.resume(spoilt, RUN) as state:
        state.remove()
        assert not spoilt.exists()
    state.close()
    state.remove()


def test_create_starts_anew(spoilt):
    assert RunState.holds_work(spoilt)
    with RunState.create(spoilt, {**RUN, "--alpha": 0.2}) as state:
        assert state.finished == 0 and not RunState.holds_work(spoilt)
        state.commit(0, *block(7))
        assert_same(state.load(0), block(7))
    assert {path.name for path in spoilt.iterdir()} == {IDENTITY, "0"}


@pytest.mark.parametrize("made", [lambda f: f.write_text("mine"), lambda f: (f.mkdir(), (f / "0").mkdir())])
def test_create_spares_what_is_no_run_state(folder, made):
    made(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(BarberError, match=r"out\.run"):
        RunState.create(folder, RUN)
    assert folder.exists() and sorted(folder.rglob("*")) == before
    assert not RunState.holds_work(folder)


# Which run it is


def test_resume_needs_a_run(folder):
    for made in (lambda: None, folder.mkdir, (folder / f"{IDENTITY}.partial").touch):
        made()
        assert not RunState.holds_work(folder)
        with pytest.raises(BarberError, match=r"^--resume: no unfinished run under .*out\.run; leave --resume out"):
            RunState.resume(folder, RUN)
    RunState.create(folder, RUN).close()
    RunState.resume(folder, RUN).close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--alpha": 0.2}, "--alpha was 0.1 in the run under {}, now 0.2"),
        ({"--batch": 8}, "--batch was None in the run under {}, now 8"),
        ({"--new": "x"}, "--new was None in the run under {}, now x"),
        ({"content of --ckpt x": "f" * 32}, "content of --ckpt x differs from that of the run under {}"),
        (
            {"--method": "magnitude", "--batch": 1},
            "--method was wanda in the run under {0}, now magnitude; --batch was None in the run under {0}, now 1",
        ),
    ],
)
def test_differing_identity_is_named(three, changes, says):
    with pytest.raises(BarberError) as refusal:
        RunState.resume(three, {**RUN, **changes})
    assert str(refusal.value) == f"--resume: {says.format(three)}; use the same or start over with --overwrite"


def test_entry_that_is_no_longer_given_is_named(three):
    with pytest.raises(BarberError, match=r"--method was wanda in the run under .*, now None"):
        RunState.resume(three, {name: value for name, value in RUN.items() if name != "--method"})


def test_many_differences_still_make_a_short_line(three):
    with pytest.raises(BarberError, match=f"and so on, {MAX_NAMED + 5} in all; use"):
        RunState.resume(three, {**RUN, **{f"content of --ckpt shard{n}": "0" for n in range(MAX_NAMED + 5)}})


def test_tuples_are_what_json_makes_of_them(folder):
    RunState.create(folder, {"--mesh": (2, 1)}).close()
    RunState.resume(folder, {"--mesh": (2, 1)}).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"--alpha": 0.1', b"[" * 100_000])
def test_damaged_identity_is_one_clear_line(spoilt, content):
    (spoilt / IDENTITY).write_bytes(content)
    with pytest.raises(BarberError, match=r"^--resume: .*identity\.json: cannot be read .* start over") as refusal:
        RunState.resume(spoilt, RUN)
    assert "\n" not in str(refusal.value)
    RunState.create(spoilt, RUN).close()


# Damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


FILES = ["_CHECKPOINT_METADATA", "commit_success.txt", f"{ITEM}/commit_success.txt", f"{ITEM}/{NAME}"]


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_damaged_last_block_is_dropped(spoilt, file, damage, capfd):
    assert {str(path.relative_to(spoilt / "2")) for path in (spoilt / "2").rglob("*") if path.is_file()} == set(FILES)
    damage(spoilt / "2" / file)
    with RunState.resume(spoilt, RUN) as state:
        if file.endswith(NAME):
            assert (state.finished, state.damaged) == (2, 2)
            assert not (spoilt / "2").exists()
        # The other files are Orbax's and say nothing of the content: without one the block may be there, but whole.
        assert_holds(state, 3 if state.damaged is None else 2)
        state.commit(state.finished, *block(state.finished))
    with RunState.resume(spoilt, RUN) as state:
        assert_holds(state, state.finished)
        assert state.finished >= 3 and state.damaged is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spoil", [lambda step: truncate(step / ITEM / NAME), shutil.rmtree])
@pytest.mark.parametrize("index", [0, 1])
def test_what_comes_after_a_damaged_block_is_dropped_too(spoilt, index, spoil):
    spoil(spoilt / str(index))
    with RunState.resume(spoilt, RUN) as state:
        assert state.damaged == index
        assert_holds(state, index)
        for again in range(index, 3):
            state.commit(again, *block(again))
        assert_holds(state, 3)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_flipped_bit_gives_another_block(three, data):
    content = bytearray((three / "0" / ITEM / NAME).read_bytes())
    # Half of the draws in the header: it is small, and what is read depends on it most.
    header = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(three, Path(place) / "run")
        (copy / "0" / ITEM / NAME).write_bytes(content)
        with RunState.resume(copy, RUN) as state:
            assert state.finished == 0 or at < header
            assert_holds(state, state.finished)


def test_block_damaged_after_resume_is_an_error(spoilt):
    with RunState.resume(spoilt, RUN) as state:
        flip(spoilt / "1" / ITEM / NAME)
        with pytest.raises(BarberError, match=r"out\.run/1: damaged .*--resume computes it again"):
            state.load(1)
        (spoilt / "1" / ITEM / NAME).unlink()
        with pytest.raises(BarberError, match=r"out\.run/1: damaged"):
            state.load(1)


def test_litter_of_a_commit_cut_short_is_cleaned_away(spoilt):
    shutil.copytree(spoilt / "2", spoilt / "3.orbax-checkpoint-tmp" / f"{ITEM}.orbax-checkpoint-tmp")
    (spoilt / f"{IDENTITY}.partial").write_text("{")
    with RunState.resume(spoilt, RUN) as state:
        assert state.damaged is None
        assert_holds(state, 3)
        assert {path.name for path in spoilt.iterdir()} == {IDENTITY, "0", "1", "2"}


def test_full_disk_is_one_clear_error_and_the_blocks_before_stay(folder, capfd):
    with RunState.create(folder, RUN) as state:
        state.commit(0, *block(0))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(BarberError, match=rf"^cannot write .*out\.run/1.*{NAME}: File too large"):
                state.commit(1, *block(1, 1 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert {path.name for path in folder.iterdir()} == {IDENTITY, "0"}
        state.commit(1, *block(1))
        assert_holds(state, 2)
    assert capfd.readouterr().err == ""


def test_folder_that_cannot_be_written_is_named(tmp_path, spoilt):
    (tmp_path / "file").touch()
    with pytest.raises(BarberError, match=r"cannot write .*file/run: Not a directory"):
        RunState.create(tmp_path / "file" / "run", RUN)
    with RunState.resume(spoilt, RUN) as state:
        shutil.rmtree(spoilt)
        spoilt.touch()
        with pytest.raises(BarberError, match=r"cannot write .*out\.run/3: Not a directory"):
            state.commit(3, *block(3))


# Processes


LOOP = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from test_run_state import RUN, RunState, block
    folder, size = Path(sys.argv[2]), int(sys.argv[3])
    state = RunState.resume(folder, RUN) if folder.exists() else RunState.create(folder, RUN)
    print("ready", flush=True)
    for index in range(state.finished, 10_000):
        state.commit(index, *block(index, size))
        print(index, flush=True)
"""


def run(script, *arguments):
    return subprocess.Popen(
        list(map(str, [sys.executable, "-c", textwrap.dedent(script), Path(__file__).parent, *arguments])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Small blocks: it is killed anywhere. Large ones: in the middle of a file.
@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_killed_process_leaves_every_block_that_it_had_committed(folder, size):
    known = 0
    for _ in range(3):
        process = run(LOOP, folder, size)
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        said, complaints = process.communicate()
        assert complaints == ""
        known += len(said.splitlines())
        with RunState.resume(folder, RUN) as state:
            assert state.damaged is None
            assert known <= state.finished <= known + 1
            known = state.finished
            assert_holds(state, known, size)
            assert {path.name for path in folder.iterdir()} == {IDENTITY, *map(str, range(known))}


def test_nothing_is_said_on_stderr(folder):
    script = """
        import os, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_run_state import ITEM, NAME, RUN, RunState, block
        folder = Path(sys.argv[2])
        with RunState.create(folder, RUN) as state:
            for index in range(3):
                state.commit(index, *block(index))
        os.truncate(folder / "2" / ITEM / NAME, 100)
        (folder / "1" / "_CHECKPOINT_METADATA").unlink()
        with RunState.resume(folder, RUN) as state:
            assert state.finished == 2
            state.commit(2, *block(2))
            state.load(2)
            state.remove()
    """
    process = run(script, folder)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_one_of_two_processes_needs_nothing_of_the_other(folder):
    script = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import jax
        from jax.experimental import multihost_utils
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]), initialization_timeout=60)
        assert jax.process_count() == 2
        if jax.process_index() == 0:
            from test_run_state import RUN, RunState, assert_holds, block
            for begin in (RunState.create, RunState.resume):
                with begin(Path(sys.argv[2]), RUN) as state:
                    state.commit(state.finished, *block(state.finished))
                    assert_holds(state, state.finished)
            (Path(sys.argv[2]) / "1" / "block" / "block.safetensors").unlink()
            with RunState.resume(Path(sys.argv[2]), RUN) as state:
                assert_holds(state, 1)
                state.remove()
        # Where the other process has been all the time.
        multihost_utils.sync_global_devices("done")
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [run(script, folder, address, number) for number in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert not folder.exists()
