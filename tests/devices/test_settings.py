"""Precision of matrix products and the choice of the selection: what the options reach, and what they change."""

import os

import jax
import jax.numpy as jnp
import pytest
from cli import prune_masks

from barber_jax import prune
from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.devices import settings
from barber_jax.devices.settings import choose_selection, set_precision
from barber_jax.eval import benchmark
from barber_jax.run.resume import run_identity


class Nothing:
    def sources(self):
        return []


def identity(**options):
    return run_identity(PruneConfig(ckpt="x", out="y", **options).as_dict(), Nothing(), None, None)


@pytest.fixture
def default_precision():
    yield
    jax.config.update("jax_default_matmul_precision", None)


def precision_of_a_product():
    product = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))).eqns[-1]
    return product.params["precision"]


@pytest.mark.parametrize("given", ["highest", "high", "default", None])
def test_matrix_products_of_a_run_have_the_given_precision(given, tiny, tiny_ids, tmp_path, monkeypatch):
    found = []

    def stop(*_):
        found.append(precision_of_a_product())
        raise BarberError("seen")

    monkeypatch.setattr(prune, "check_inputs", stop)
    with pytest.raises(BarberError, match="seen"):
        prune_masks(tmp_path / "out", tiny(), tiny_ids, *(["--matmul-precision", given] if given else []))
    precision = getattr(jax.lax.Precision, (given or "highest").upper())
    assert found == [(precision, precision)]


def test_the_precision_of_a_benchmark(tmp_path, monkeypatch, default_precision):
    """Its peak is measured in the precision of the run."""
    found = []
    monkeypatch.setattr(benchmark, "benchmark", lambda _: found.append(precision_of_a_product()) or {})
    monkeypatch.setattr(benchmark, "show", lambda _: None)
    benchmark.run(["--ckpt", "x", "--matmul-precision", "high", "--compilation-cache", str(tmp_path)])
    assert found == [(jax.lax.Precision.HIGH, jax.lax.Precision.HIGH)]


def test_commands_without_the_option_compute_in_full_precision(default_precision):
    set_precision()
    assert precision_of_a_product() == (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


UNWANTED = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_random_seed_offset": 5,
    "jax_legacy_prng_key": "error",
    "jax_transfer_guard": "disallow",
    "jax_disable_jit": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
}


def test_a_users_settings_for_other_programs_change_nothing(default_precision):
    """As JAX reads them from the environment."""
    assert settings.RESULTS_DEPEND_ON.keys() == UNWANTED.keys()
    before = {name: getattr(jax.config, name) for name in UNWANTED}
    try:
        for name, value in UNWANTED.items():
            jax.config.update(name, value)
        settings.prepare_jax("off")
        assert {name: getattr(jax.config, name) for name in UNWANTED} == settings.RESULTS_DEPEND_ON
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        for name, value in before.items():
            jax.config.update(name, value)


def test_what_the_options_change():
    """The precision changes the result; how weights are selected does not."""
    assert identity(matmul_precision="high") != identity()
    assert identity(selection="top_k") == identity()
    line = PruneConfig(ckpt="x", out="y", matmul_precision="high", selection="top_k").command_line()
    assert line[line.index("--matmul-precision") + 1] == "high" and "--selection" not in line


@pytest.mark.parametrize(
    ("plugins", "given", "flags"),
    [
        ([], "--a=1", "--a=1"),
        (["xla_tpu"], "--a=1", "--a=1"),
        (["xla_cuda13"], "", " ".join(settings.GPU_FLAGS)),
        (["xla_rocm60"], "--a=1", " ".join([*settings.GPU_FLAGS, "--a=1"])),
        # What the user asks for stays.
        (["cuda12"], "--xla_gpu_deterministic_ops=false", f"{settings.GPU_FLAGS[1]} --xla_gpu_deterministic_ops=false"),
    ],
)
def test_gpu_programs_are_deterministic(plugins, given, flags, monkeypatch):
    class Plugins:
        names = plugins

    monkeypatch.setattr(settings.importlib.metadata, "entry_points", lambda group: Plugins)
    monkeypatch.setenv("XLA_FLAGS", given)
    settings.set_gpu_determinism()
    assert os.environ["XLA_FLAGS"] == flags


def test_auto_decides_by_platform():
    assert choose_selection("auto", "cpu") == "count"
    for platform in ("cpu", "gpu", "tpu", "other"):
        assert choose_selection("auto", platform) in ("count", "top_k")
        assert [choose_selection(given, platform) for given in ("top_k", "count")] == ["top_k", "count"]
