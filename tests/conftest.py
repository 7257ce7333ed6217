"""What all tests share: virtual devices, one cache of compiled programs, tiny models written once."""

import os
import shutil
import tempfile

CACHE = "JAX_COMPILATION_CACHE_DIR"
DEVICES = 8
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


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as users' are, within a module."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


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
