"""GBLM-Pruner as a starting criterion: its score, its gradients on disk, its options."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from cli import agreement, prune_masks
from criterion_contract import CriterionContract

from barber_jax import prune
from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.criteria import CRITERIA, gblm
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector
from barber_jax.run import dense_gradients
from barber_jax.run.gradient_file import WEIGHTS

SMALL = ("--samples", 8, "--length", 8, "--no-rebuild")


class TestGblm(CriterionContract):
    method = "gblm"
    options = ("--method", "gblm", "--no-rebuild")


def plain_mask(weight, squares, gradients, beta, norm, pattern):
    """float64 kept weights [O, I], from weight [O, I], squares of the inputs [S, I] and gradients [S, O, I]."""
    order = {"l1": 1, "l2": 2}[norm]
    activation = np.sqrt(squares.mean(0))
    score = np.abs(weight) * activation + beta * np.abs(weight) * np.linalg.norm(gradients, order, axis=0)
    groups = score.reshape(len(score), -1, pattern.of) if pattern.structured else score[:, None]
    pruned = groups.shape[-1] - pattern.keep if pattern.structured else int(groups.shape[-1] * pattern.sparsity)
    ranks = groups.argsort(-1, kind="stable").argsort(-1, kind="stable")
    return (ranks >= pruned).reshape(score.shape)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("pattern", [SparsityPattern(0.4), SparsityPattern(0.5, 2, 4)], ids=str)
def test_score_is_the_papers(norm, pattern):
    rng = np.random.default_rng(2)
    weight, squares = rng.normal(size=(6, 20)), rng.gamma(1.0, size=(5, 20))
    gradients = 1e-2 * rng.normal(size=(5, 6, 20)) * rng.gamma(0.3, size=(1, 6, 20))
    mean = np.abs(gradients).mean(0) if norm == "l1" else np.sqrt(np.square(gradients).mean(0))
    statistics = jnp.float32(squares.sum(0)), jnp.float32(mean.T)
    for beta in (0.0, 100.0):
        start = gblm.Start(beta, norm)
        quota = () if pattern.structured else CRITERIA["gblm"].quota(weight.shape, pattern.sparsity)
        mask, updated = start(jnp.float32(weight.T), statistics, 5, pattern, quota, Selector("count"))
        assert updated is None
        np.testing.assert_array_equal(mask, plain_mask(weight, squares, gradients, beta, norm, pattern))
    assert (plain_mask(weight, squares, gradients, 0.0, norm, pattern) != mask).any()


def test_without_gradients_it_is_wanda(tiny, tiny_ids, tmp_path):
    wanda = prune_masks(tmp_path / "wanda", tiny(), tiny_ids, *SMALL)
    options = ("--method", "gblm", "--gblm-norm", "l2", "--gblm-beta")
    none = prune_masks(tmp_path / "none", tiny(), tiny_ids, *SMALL, *options, 0)
    some = prune_masks(tmp_path / "some", tiny(), tiny_ids, *SMALL, *options, 30)
    assert agreement(none, wanda) == 1 > agreement(some, wanda) > 0.5
    recorded = json.loads((tmp_path / "some" / "run.json").read_text())["options"]
    assert (recorded["method"], recorded["gblm_beta"], recorded["gblm_norm"]) == ("gblm", 30.0, "l2")


def test_a_finished_sweep_is_not_repeated(tiny, tiny_ids, tmp_path, monkeypatch, capsys):
    """Interrupted before the first block is done, and resumed; then with a damaged file, which is computed again."""
    line = ["--ckpt", tiny(), "--calibration", tiny_ids, *SMALL, "--method", "gblm", "--out"]
    prune.run([str(word) for word in [*line, tmp_path / "whole"]])
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    out, file = tmp_path / "out", tmp_path / "out.run" / WEIGHTS

    def stop(*_):
        raise KeyboardInterrupt

    def interrupted(*more):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prune, "write_blocks", stop)
            prune.run([str(word) for word in [*line, out, *more]])

    interrupted()
    assert "the gradients of the dense model and 0 of 2 blocks are kept" in capsys.readouterr().err
    with pytest.raises(BarberError, match="holds an unfinished run; --resume continues it"):
        prune.run([str(word) for word in [*line, out]])
    whole, again, sweep = file.read_bytes(), [], dense_gradients.sweep
    monkeypatch.setattr(dense_gradients, "sweep", lambda *given, **more: again.append(1) or sweep(*given, **more))
    interrupted("--resume")
    assert not again and "gradients of the dense model, kept by the interrupted run" in capsys.readouterr().err
    file.write_bytes(whole[:-40] + bytes(40))
    interrupted("--resume")
    assert (
        again and f"{WEIGHTS}: damaged; the gradients of the dense model are computed again" in capsys.readouterr().err
    )
    assert file.read_bytes() == whole
    prune.run([str(word) for word in [*line, out, "--resume"]])
    assert (out / "model.safetensors").read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gblm_beta": 1.0}, "--gblm-beta 1.0 needs --method gblm"),
        ({"gblm_norm": "l2", "method": "wanda"}, "--gblm-norm l2 needs --method gblm"),
        ({"gblm_beta": 1.0, "masks": "m.safetensors"}, "--gblm-beta 1.0 needs --method gblm"),
        ({"method": "gblm", "gblm_beta": -1.0}, "--gblm-beta -1 must be a finite number of at least 0"),
        ({"method": "gblm", "gblm_beta": float("nan")}, "--gblm-beta nan must be a finite number"),
        ({"method": "gblm", "gblm_beta": float("inf")}, "--gblm-beta inf must be a finite number"),
        ({"method": "gblm", "gblm_beta": 1e39}, "--gblm-beta 1e+39 must be a finite number of at least 0, within"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(BarberError) as refused:
        PruneConfig(ckpt="dense", out="out", **options)
    assert str(refused.value).startswith(says)
