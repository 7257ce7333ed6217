"""What all tests share: virtual devices, one cache of compiled programs, tiny models written once."""

import functools
import importlib.util
import itertools
import mmap
import os
import shutil
import signal
import tempfile
from pathlib import Path

MAPPINGS, MOST_MAPPINGS, TESTS = Path("/proc/self/maps"), 40_000, itertools.count(1)
CACHE = "JAX_COMPILATION_CACHE_DIR"
DEVICES = 8
QUICK_TO_COMPILE = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
"""Older code generation of XLA's, which takes a quarter of the time to compile; for the quick suite alone."""
# Before JAX is imported. Test processes share the cores, so a computation uses one thread. Most of the time goes into
# compiling, so programs are compiled with few optimizations, except where masks are compared with those of the authors'
# code (`optimized`).
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_multi_thread_eigen=false "
    + os.environ.get("XLA_FLAGS", "")
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    # The workers of pytest-xdist inherit their parent's.
    if not hasattr(config, "workerinput"):
        os.environ[CACHE] = tempfile.mkdtemp(prefix="barber_jax_compiled_")
        # `make slow-test` compiles with XLA's own choice.
        if config.option.markexpr != "slow":
            os.environ["XLA_FLAGS"] = " ".join([*_known(QUICK_TO_COMPILE), os.environ["XLA_FLAGS"]])


def _known(flags):
    """Those flags that the installed XLA knows: with any other a process would end at once."""
    spec = importlib.util.find_spec("jaxlib")
    for path in Path(spec.origin).parent.glob("libjax_common.*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            return [flag for flag in flags if library.find(flag.partition("=")[0].strip("-").encode()) >= 0]
    return []


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """A command that a test runs in this process leaves its handlers to no other test, nor to later processes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled with all optimizations, within a module; with `-m slow` exactly as users' are."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _programs_are_forgotten_in_time():
    """Compiled programs stay in memory, each in many mappings, of which Linux allows a process 65530 by default: beyond
    them JAX ends in a segmentation fault, where it reads a program from its cache or compiles one."""
    yield
    # To count them takes milliseconds.
    if next(TESTS) % 8 == 0 and MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _figures_are_titles():
    """Pages hold the titles of figures: to draw them takes longer than to prune a tiny model. But see `drawn`."""
    from barber_jax.reports.figures import Plots
    from barber_jax.reports.markup import element

    @functools.wraps(Plots.draw)
    def title_only(plots, draw, title, *size, **rows):
        return element("figure", element("figcaption", title))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plots, "draw", title_only)
        yield


@pytest.fixture(scope="module")
def drawn():
    """Figures are drawn, within a module."""
    from barber_jax.reports.figures import Plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plots, "draw", Plots.draw.__wrapped__)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random model of a family, the same for the whole session: not to be written to."""
    from checkpoints import write_model

    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def model(family="llama", **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = folder / f"{family}{len(made)}"
            write_model(made[key], family, **changes)
        return made[key]

    return model


@pytest.fixture(scope="session")
def tiny_ids(tmp_path_factory):
    """32 rows of 16 token ids of the tiny models, as a .npy file."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(1).integers(0, 97, (32, 16)))
    return path


@pytest.fixture(scope="session")
def tiny_pruned(tmp_path_factory, tiny, tiny_ids):
    """Folder of the tiny LLaMA pruned to 2:4: not to be written to."""
    from cli import prune_masks

    folder = tmp_path_factory.mktemp("tiny_pruned") / "pruned"
    options = ["--samples", 4, "--length", 16, "--no-rebuild", "--method", "magnitude", "--pattern", "2:4"]
    prune_masks(folder, tiny(), tiny_ids, *options)
    return folder
