"""Compiled programs of the tests are kept apart from the user's, and shared by all processes of a session."""

import os
import shutil
import tempfile

CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
    os.environ[CACHE] = tempfile.mkdtemp(prefix="barber_jax_compiled_")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)
