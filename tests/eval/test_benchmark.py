"""Operation counts against counts by hand, and the benchmark's command line."""

import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import BASE, write_model
from cli import command

from barber_jax.config import PruneConfig
from barber_jax.console.errors import exit_with_one_line
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.eval import benchmark, operations
from barber_jax.eval.benchmark import BenchmarkConfig
from barber_jax.forward import cotangents
from barber_jax.models import build_model

# 2 samples of 8 tokens, hidden 32, intermediate 48, 4 heads of 8; LLaMA has 2 key-value heads.
TOKENS = 16
CAUSAL = 2 * 4 * 32 * (8 * 9 // 2)
COUNTS = {
    "llama": {
        "start": 2 * TOKENS * (32 * 32 + 32 * 16 * 2 + 32 * 32 + 2 * 32 * 48) + CAUSAL,
        "propagate": 107520 + 147456,
        "self_attn gradient": 2 * 107520 + 98304 + 32768 + 2 * CAUSAL,
        "self_attn propagate": 107520,
        "mlp gradient": 3 * 147456 + 49152,
        "mlp propagate": 147456,
    },
    "opt": {
        "start": 2 * TOKENS * (4 * 32 * 32 + 32 * 48) + CAUSAL,
        "propagate": 140288 + 98304,
        "self_attn gradient": 2 * 140288 + 131072 + 32768 + 2 * CAUSAL,
        "self_attn propagate": 140288,
        "mlp gradient": 3 * 98304 + 49152,
        "mlp propagate": 98304,
    },
}


def model_of(folder):
    return build_model(open_checkpoint(str(folder)).config, jnp.dtype("float32"))


@pytest.mark.parametrize("family", list(COUNTS))
def test_operations_of_a_block(family, tmp_path):
    write_model(tmp_path / "dense", family)
    config = PruneConfig(ckpt="dense", out=Path("out"), samples=2, length=8)
    model = model_of(tmp_path / "dense")
    assert operations.block_operations(model, config, last=False) == COUNTS[family]
    whole = operations.run_operations(model, config)
    # Nobody looks at stream A after the last of the two blocks.
    assert whole["propagate"] == COUNTS[family]["propagate"]
    assert whole["mlp gradient"] == 2 * COUNTS[family]["mlp gradient"]


def test_stages_that_are_not_run_count_nothing(tmp_path):
    write_model(tmp_path / "dense")
    model = model_of(tmp_path / "dense")
    magnitude = PruneConfig(ckpt="dense", out=Path("out"), samples=2, length=8, method="magnitude", rebuild=False)
    assert set(operations.block_operations(model, magnitude, last=False).values()) == {0}
    sparsegpt = PruneConfig(ckpt="dense", out=Path("out"), samples=2, length=8, method="sparsegpt")
    more = operations.block_operations(model, sparsegpt, last=True)["start"] - COUNTS["llama"]["start"]
    grams = 2 * TOKENS * (32**2 * 3 + 48**2) + 3 * (2 * 32**3 // 3) + 2 * 48**3 // 3
    updates = 32**2 * (32 + 16 + 16 + 32 + 48 + 48) + 48**2 * 32
    assert more == grams + updates
    alps = PruneConfig(ckpt="dense", out=Path("out"), samples=2, length=8, method="alps")
    more = operations.block_operations(model, alps, last=True)["start"] - COUNTS["llama"]["start"]
    grams = 2 * TOKENS * (32**2 * 3 + 48**2) + 3 * (10 * 32**3 // 3) + 10 * 48**3 // 3
    # Two products in each of 40 steps of ADMM, one in 10 of conjugate gradients and one before them.
    assert more == grams + 2 * (2 * 40 + 10 + 1) * updates


@pytest.mark.parametrize("family", list(COUNTS))
def test_operations_against_the_program(family, tmp_path):
    """Products in the programs that JAX traces for a sub-block and its gradient, attention counted as causal."""
    write_model(tmp_path / "dense", family)
    model = model_of(tmp_path / "dense")
    block, samples, length = model.block(), 2, 8
    parameters = {path: jnp.ones(shape) for path, shape in block.shapes}
    hidden = jnp.ones((samples, length, model.hidden))
    for sub in model.sub_blocks:

        def run(kernels, sub=sub):
            return block.bind({**parameters, **kernels}).apply(sub.name, hidden)

        kernels = {path: parameters[path] for path in sub.kernels}
        # What a forward computes above the diagonal and no result needs.
        waste = CAUSAL * 2 * length // (length + 1) - CAUSAL if sub.name == "self_attn" else 0
        forward = products(jax.make_jaxpr(run)(kernels).jaxpr) - waste
        both = products(jax.make_jaxpr(jax.grad(lambda k, run=run: jnp.sum(run(k) ** 2)))(kernels).jaxpr) - 3 * waste
        assert operations.forward_operations(model, sub, samples, length) == forward
        # The other forward is the sparse one's.
        assert operations.gradient_operations(model, sub, samples, length) == forward + both


@pytest.mark.parametrize("family", list(COUNTS))
def test_operations_of_the_sweep_against_the_program(family, tiny):
    """Of one sample: a block's backward pass and its weight gradients, beside the forward pass that it repeats."""
    model = model_of(tiny(family))
    block, samples, length = model.block(), 1, 8
    parameters = {path: jnp.ones(shape) for path, shape in block.shapes}
    stream = jnp.ones((1, samples, length, model.hidden))

    def back(parameters, stream, totals):
        return cotangents.backward.__wrapped__(block, parameters, stream, stream, totals, "l2", False)

    forward = sum(operations.forward_operations(model, sub, samples, length) for sub in model.sub_blocks)
    waste = samples * (CAUSAL // 2 * 2 * length // (length + 1) - CAUSAL // 2)
    counted = products(jax.make_jaxpr(back)(parameters, stream, cotangents.zero_totals(block)).jaxpr)
    assert counted == 3 * (forward + waste)
    head = 2 * 2 * samples * length * 32 * 97
    assert operations.sweep_operations(model, samples, length) == model.layers * 4 * forward + head
    config = PruneConfig(ckpt="dense", out=Path("out"), samples=1, length=8, method="gblm")
    wanda = PruneConfig(ckpt="dense", out=Path("out"), samples=1, length=8)
    more = operations.run_operations(model, config)
    assert more.pop("gradients") == model.layers * 4 * forward + head
    assert more == operations.run_operations(model, wanda)


def products(jaxpr) -> int:
    """Operations of all matrix products of a program, those of its parts too."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(products(part.jaxpr) for part in equation.params.values() if hasattr(part, "jaxpr"))
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
    return total


@pytest.mark.parametrize(
    ("layers", "median", "last"),
    [(2, 8.0, True), (3, 4.0, False), (5, 5.0, False)],
)
def test_steady_block(layers, median, last, tmp_path):
    """The compiling block and the last, which has less to do, are left out where others are left."""
    write_model(tmp_path / "dense")
    model = model_of(tmp_path / "dense")
    config = PruneConfig(ckpt="dense", out=Path("out"), samples=2, length=8)
    middle = [4.0, 6.0, 5.0][: layers - 2]
    blocks = [{"seconds": {"start": total * 0.75, "mlp swap": total * 0.25}} for total in [99.0, *middle, 8.0]]
    figures = benchmark.steady_block(model, config, blocks, lambda spent, needed: {"seconds": spent, "needed": needed})
    needed = sum(operations.block_operations(model, config, last=last).values())
    assert figures == {"seconds": median, "needed": needed, "swap_share": 0.25}
    assert benchmark.steady_block(model, config, blocks[:1], None) is None


def test_micro_batch_of_few_samples():
    """The peak is measured on as many tokens as a pruning works on at a time, not on --batch's."""
    assert benchmark.micro_batch_tokens(BenchmarkConfig(ckpt="dense", samples=4, length=8, batch=32)) == 32
    assert benchmark.micro_batch_tokens(BenchmarkConfig(ckpt="dense", samples=6, length=8, batch=4)) == 24


def test_repeated_into_a_temporary_folder(tmp_path, monkeypatch, capsys):
    """Without --out nothing stays; the figures are the fastest pruning's, which found its programs compiled."""
    write_model(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 8)))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    options = ["--ckpt", tmp_path / "dense", "--calibration", tmp_path / "ids.npy", "--samples", 2, "--length", 8]
    benchmark.run([*map(str, options), "--repeat", "2", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["wall_seconds"]) == 2
    assert figures["whole"]["seconds"] == min(figures["wall_seconds"])
    assert sum(stage["seconds"] for stage in figures["stages"].values()) < figures["whole"]["seconds"]
    assert not list((tmp_path / "temporary").iterdir())
    assert "wall seconds of each pruning" in capsys.readouterr().out


@pytest.mark.slow
def test_command_line(tmp_path):
    write_model(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 8)))
    options = ["--ckpt", tmp_path / "dense", "--out", tmp_path / "out", "--calibration", tmp_path / "ids.npy"]
    options += ["--samples", 2, "--length", 8, "--json", tmp_path / "figures.json", "--overwrite"]
    # Another cache than the other tests': the first run must find it empty.
    options += ["--compilation-cache", tmp_path / "compiled"]
    runs = []
    for _ in range(2):
        said = command("eval.benchmark", *options)
        assert said.returncode == 0, said.stderr
        assert "mlp gradient" in said.stdout and "peak" in said.stdout
        runs.append(json.loads((tmp_path / "figures.json").read_text()))
    for figures in runs:
        assert figures["stages"].keys() >= COUNTS["llama"].keys()
        total = sum(stage["operations"] for stage in figures["stages"].values())
        assert figures["whole"]["operations"] == total > 0
        assert 0 < sum(stage["seconds"] for stage in figures["stages"].values()) < figures["whole"]["seconds"]
        assert figures["peak"]["flops"] == max(figures["peak"]["shapes"].values())
    assert runs[0]["compilation"]["cache"]["misses"] > 10
    # What was compiled once is never compiled again.
    assert runs[1]["compilation"]["cache"]["misses"] == 0
    assert runs[1]["compilation"]["cache"]["hits"] > 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--samples", "2"], "missing --ckpt"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--ckpt", "nowhere", "--repeat", "0"], "--repeat 0"),
        (["--ckpt", "nowhere", "--out", "out", "--mesh", "data=2"], "--mesh"),
        (["--ckpt", "nowhere", "--out", "out", "--resume"], "--resume"),
        (["--ckpt", "nowhere", "--coordinator", "a:1", "--processes", "2", "--process", "0"], "--coordinator"),
        (["--ckpt", "nowhere", "--eval-text", "text.txt"], "--eval-text"),
        (["--ckpt", "nowhere", "--out", "out", "--json", "/"], "--json"),
    ],
)
def test_bad_options(options, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        exit_with_one_line(lambda: benchmark.run(options))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and complaint in said and said.startswith("error: ") and said.count("\n") == 1
