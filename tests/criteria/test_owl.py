"""OWL's sparsity of every block, against PyTorch on a tiny model; all blocks share their programs nevertheless."""

import json
import re

import numpy as np
import pytest
import transformers
from checkpoints import BASE, FAMILIES, write_model
from cli import prune_masks
from safetensors.numpy import load_file, save_file

from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.criteria import CRITERIA, owl
from barber_jax.devices.mesh import Devices
from barber_jax.eval.benchmark import CompilationWatch
from barber_jax.eval.runs import load_run
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model
from barber_jax.run import loop

QUICK = ["--samples", 4, "--length", 16, "--sparsity", 0.7, "--allocate", "owl"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models whose blocks differ in outliers, and ids."""
    folder = tmp_path_factory.mktemp("allocation")
    for family in ("llama", "opt"):
        write_model(folder / family, family, num_hidden_layers=4)
        spread(folder / family)
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    return folder


def spread(folder):
    """Give later blocks larger outliers."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (block := re.search(r"layers\.(\d+)\.", name)):
            tensors[name] = tensor * np.abs(tensor) ** np.float32(0.4 * int(block[1]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def layers_of(model):
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def linears_of(layer):
    import torch

    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def plain_ratios(model, ids, threshold):
    """Outlier ratios in float64, from PyTorch hooks on every linear."""
    import torch

    squares = {}
    for layer in layers_of(model):
        for linear in linears_of(layer):

            def seen(module, inputs):
                squares[module] = inputs[0].double().flatten(0, -2).square().sum(0)

            linear.register_forward_pre_hook(seen)
    with torch.no_grad():
        model(torch.as_tensor(ids).long())
    ratios = []
    for layer in layers_of(model):
        scores = [(m.weight.double().abs() * squares[m].sqrt()).flatten() for m in linears_of(layer)]
        scores = torch.cat(scores)
        ratios.append(float((scores > threshold * scores.mean()).double().mean()))
    return ratios


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_outlier_ratios_are_those_of_pytorch(family, inputs):
    pytest.importorskip("torch")
    ids = np.load(inputs / "ids.npy").astype(np.int32)
    checkpoint = open_checkpoint(str(inputs / family))
    model = build_model(checkpoint.config, np.dtype("float32"))
    for threshold in (2.0, 5.0):
        want = plain_ratios(getattr(transformers, FAMILIES[family][1]).from_pretrained(inputs / family), ids, threshold)
        got = owl.outlier_ratios(checkpoint, model, ids.reshape(2, 2, 16), Devices(), threshold=threshold)
        # One weight of the block more or less, by rounding.
        np.testing.assert_allclose(got, want, atol=1.5 / 7168)
        assert max(want) - min(want) > 20 / 7168


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.85])
def test_allotted_as_the_paper_says(sparsity):
    ratios = [0.02, 0.05, 0.021, 0.03]
    got = np.array(owl.allocate(ratios, sparsity, 0.08))
    kept = 1 - got
    assert np.ptp(kept) == pytest.approx(0.16) and kept.mean() == pytest.approx(1 - sparsity, abs=1e-15)
    np.testing.assert_allclose((kept - kept.min()) / 0.16, (np.array(ratios) - 0.02) / 0.03, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.95, 0.999])
@pytest.mark.parametrize("ratios", [[0.0, 0.0, 0.1], [0.1, 0.0, 0.1, 0.1], [0.1, 0.2]])
def test_what_does_not_fit_is_spread_less(sparsity, ratios):
    got = np.array(owl.allocate(ratios, sparsity, 0.3))
    assert got.min() >= 0 and got.max() < 1 and got.mean() == pytest.approx(sparsity, abs=1e-15)
    assert (np.argsort(-got, kind="stable") == np.argsort(ratios, kind="stable")).all() or sparsity == 0


def test_blocks_without_a_difference_are_pruned_alike():
    assert owl.allocate([0.1, 0.1, 0.1], 0.6, 0.08) == [0.6, 0.6, 0.6]


@pytest.mark.parametrize(
    "method", ["magnitude", "wanda", "sparsegpt", "alps", pytest.param("gblm", marks=pytest.mark.slow)]
)
def test_every_criterion_prunes_what_is_allotted(method, inputs, tmp_path, monkeypatch):
    """And finds the programs of the first block in all others."""
    watch, compiled, counted = CompilationWatch(), [], owl.count_outliers._cache_size()
    result = loop.Pruning._result

    def count(self, *arguments):
        compiled.append(watch.programs)
        return result(self, *arguments)

    monkeypatch.setattr(loop.Pruning, "_result", count)
    made = prune_masks(
        tmp_path / "out", inputs / "llama", inputs / "ids.npy", *QUICK, "--method", method, "--no-rebuild"
    )
    assert len(compiled) == 4 and len(set(compiled)) == 1 and compiled[0] > 0
    assert owl.count_outliers._cache_size() <= counted + 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    allotted = record["allocation"]
    assert len(set(allotted)) == 4
    assert np.mean(allotted) == pytest.approx(0.7) and np.ptp(allotted) == pytest.approx(0.16)
    assert (record["options"]["owl_lambda"], record["options"]["owl_m"]) == (0.08, 5.0)
    assert read_masks(tmp_path / "out" / "masks.safetensors").sparsity == 0.7
    groups = 0
    for name, mask in made.items():
        (quota, *_) = CRITERIA[method].quota(mask.shape, allotted[int(name.split(".")[2])])
        if method not in ("wanda", "gblm"):
            assert mask.size - mask.sum() == quota, name
            groups += 1
        else:
            assert (mask.shape[1] - mask.sum(axis=1) == quota).all(), name
            groups += mask.shape[0]
    # Every comparison group has lost the floor of its share; sparsegpt's threshold is pruned too.
    size, pruned = (sum(part(mask) for mask in made.values()) for part in (np.size, lambda m: m.size - m.sum()))
    assert -groups < pruned - 0.7 * size <= (groups if method == "sparsegpt" else 1e-6)


def test_without_outliers_it_is_said_and_uniform(inputs, tmp_path, capsys):
    options = [*QUICK, "--method", "magnitude", "--no-rebuild", "--owl-m", 1e6]
    prune_masks(tmp_path / "out", inputs / "llama", inputs / "ids.npy", *options)
    assert "--owl-m 1e+06: all blocks have the same outlier ratio" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["allocation"] == [0.7] * 4


def test_a_run_from_the_masks_knows_how_they_were_allotted(inputs, tmp_path):
    options = [*QUICK, "--method", "magnitude", "--no-rebuild", "--owl-lambda", 0.1]
    first = prune_masks(tmp_path / "first", inputs / "llama", inputs / "ids.npy", *options)
    given = [*QUICK[:4], "--masks", tmp_path / "first" / "masks.safetensors", "--no-rebuild"]
    again = prune_masks(tmp_path / "again", inputs / "llama", inputs / "ids.npy", *given)
    assert all((again[name] == mask).all() for name, mask in first.items())
    settings = load_run(tmp_path / "again").settings
    assert [settings[name] for name in ("method", "allocate", "owl_lambda", "owl_m")] == ["magnitude", "owl", 0.1, 5.0]
