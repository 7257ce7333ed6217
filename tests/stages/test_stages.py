"""Token weighting, held-out choices, refinement on other samples and reconstruction, against plain recomputations."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import BASE, write_model, write_reference
from safetensors.numpy import load_file

from barber_jax import prune
from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import read_parameters
from barber_jax.masks.mask_file import read_masks
from barber_jax.models import build_model
from barber_jax.stages import gradients, layerwise, rebuild, targets, training
from barber_jax.stages.exact_swaps import make_swaps
from barber_jax.stages.loss import loss
from barber_jax.stages.rebuild import ALPHAS
from barber_jax.stages.refine import SHRINKAGES, refine_matrix

FAMILIES = ("llama", "opt", "opt-post-norm")


def tiny(folder, family="llama"):
    """A tiny model, the parameters of its first block, and random hidden states [1, S, L, D]."""
    changes = {"do_layer_norm_before": False} if family.endswith("post-norm") else {}
    write_model(folder, family.partition("-")[0], **changes)
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    read = read_parameters(checkpoint, model.names.of_block(0))
    parameters = {path: jnp.asarray(value) for path, value in read.items()}
    hidden = np.random.default_rng(1).normal(size=(1, 4, 12, 32)).astype(np.float32)
    # Tokens of very different size, one of them with a mean far from zero.
    hidden *= np.geomspace(0.1, 100, 12)[:, None]
    hidden[:, :, 3] += 5
    return model, parameters, jnp.asarray(hidden)


def random_masks(model, parameters, seed=0, kept=0.5):
    rng = np.random.default_rng(seed)
    paths = [path for sub in model.sub_blocks for path in sub.kernels]
    return {path: jnp.asarray(rng.random(parameters[path].shape[::-1]) < kept) for path in paths}


def of(sub, masks):
    return {path: masks[path] for path in sub.kernels}


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_weighting_divides_by_what_the_norm_divides_by(family, tmp_path):
    model, parameters, hidden = tiny(tmp_path, family)
    masks = random_masks(model, parameters)
    for sub in model.sub_blocks:
        definition = model.block()
        block = definition.bind(parameters)
        dense = np.asarray(block.apply(sub.name, block.enter(sub.name, hidden[0])))
        target = targets.same(definition, sub, parameters, hidden)
        np.testing.assert_allclose(target[0], dense, atol=1e-5)
        sparse = {path: np.where(mask.T, parameters[path], 0) for path, mask in of(sub, masks).items()}
        bound = definition.bind({**parameters, **sparse})
        y = np.asarray(bound.apply(sub.name, bound.enter(sub.name, hidden[0])))
        residual = np.asarray(hidden[0]) + dense
        spread = (residual**2).mean(-1) if family == "llama" else residual.var(-1)
        want = np.mean((y - dense) ** 2 / (spread[..., None] + 1e-6))
        got = loss(definition, sub, parameters, of(sub, masks), hidden, target, "norm")
        np.testing.assert_allclose(got, want, rtol=1e-4)
        plain = loss(definition, sub, parameters, of(sub, masks), hidden, target, "none")
        np.testing.assert_allclose(plain, np.mean((y - dense) ** 2), rtol=1e-4)


def test_norm_weighted_importance_is_the_gradient_of_that_loss(tmp_path):
    model, parameters, hidden = tiny(tmp_path)
    definition, masks = model.block(), random_masks(model, parameters)
    for sub in model.sub_blocks:
        own = of(sub, masks)
        squares = {path: 0.0 for path in sub.kernels}
        for sample in hidden[0]:
            block = definition.bind(parameters)
            dense = block.apply(sub.name, block.enter(sub.name, sample[None]))
            spread = jnp.mean((sample + dense[0]) ** 2, -1) + 1e-6
            zeroed = {path: jnp.where(mask.T, parameters[path], 0) for path, mask in own.items()}
            bound = definition.bind({**parameters, **zeroed})
            wanted = bound.apply(sub.name, bound.enter(sub.name, sample[None]))

            def loss(kernels, sample=sample, wanted=wanted, spread=spread, sub=sub):
                block = definition.bind({**parameters, **kernels})
                y = block.apply(sub.name, block.enter(sub.name, sample[None]))
                return jnp.mean(jnp.square(y - wanted)[0] / spread[:, None])

            gradient = jax.grad(loss)({path: parameters[path] for path in sub.kernels})
            squares = {path: squares[path] + np.square(gradient[path]) for path in sub.kernels}
        totals = gradients.zero_totals(definition, sub)
        totals, _ = gradients.accumulate(definition, sub, parameters, {}, own, hidden, totals, "norm")
        got, _ = gradients.importance(sub, totals, jnp.float32(4))
        for path in sub.kernels:
            np.testing.assert_allclose(got[path], np.sqrt(squares[path] / 4), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_target_leads_back_to_the_dense_stream(family, tmp_path):
    model, parameters, hidden = tiny(tmp_path, family)
    definition = model.block()
    dense_stream = hidden * 1.1 + 0.05
    for sub in model.sub_blocks:
        block = definition.bind(parameters)
        after, target = targets.dense(definition, sub, parameters, jnp.array(dense_stream), hidden)
        own = block.apply(sub.name, block.enter(sub.name, dense_stream[0]))
        np.testing.assert_allclose(after[0], block.leave(sub.name, dense_stream[0], own), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(block.leave(sub.name, hidden[0], target[0]), after[0], rtol=1e-4, atol=1e-4)


def test_training_is_adam_with_a_rate_for_each_matrix(tmp_path):
    """The steps of PyTorch's Adam on PyTorch's own MLP, with our schedule."""
    torch = pytest.importorskip("torch")
    model, parameters, hidden = tiny(tmp_path)
    reference = write_reference(tmp_path)
    definition, sub = model.block(), model.sub_blocks[1]
    masks, steps = of(sub, random_masks(model, parameters)), 6
    target = targets.same(definition, sub, parameters, hidden)
    plan = training.Plan(steps, 0.05, "none")
    state = training.begin(sub, plan, {path: parameters[path] for path in sub.kernels}, masks)
    chosen = training.schedule(4, steps, 2, seed=0)
    order = np.stack([np.zeros_like(chosen), chosen], -1).reshape(steps, 2, 1, 2).astype(np.int32)
    arguments = (definition, sub, plan, parameters, masks, hidden, target, order, state)
    values = training.train(*arguments).values

    layer = reference.model.layers[0]
    linears = {path: getattr(layer.mlp, path.split(".")[1]) for path in sub.kernels}
    kept = {path: torch.tensor(np.asarray(masks[path])) for path in sub.kernels}
    for path, linear in linears.items():
        linear.weight.data *= kept[path]
    scales = {path: linear.weight.data[kept[path]].square().mean().sqrt().item() for path, linear in linears.items()}
    groups = [{"params": linear.weight, "scale": scales[path]} for path, linear in linears.items()]
    optimizer = torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    x, wanted = torch.tensor(np.asarray(hidden[0])), torch.tensor(np.asarray(target[0]))
    for number, samples in enumerate(chosen):
        # One step of warm-up, then half a cosine down to the end.
        rate = 0.05 * (0 if number == 0 else 0.5 * (1 + np.cos(np.pi * (number - 1) / (steps - 1))))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        y = layer.mlp(layer.post_attention_layernorm(x[samples]))
        ((y - wanted[samples]) ** 2).mean().backward()
        for path, linear in linears.items():
            linear.weight.grad *= kept[path]
        optimizer.step()
    for path, linear in linears.items():
        mask = np.asarray(masks[path])
        np.testing.assert_allclose(values[path].T[mask], linear.weight.detach().numpy()[mask], atol=2e-4)
        np.testing.assert_array_equal(values[path].T[~mask], parameters[path].T[~mask])
        assert np.abs(values[path] - parameters[path]).max() > 0.005


def test_every_sample_has_its_turn():
    chosen = training.schedule(6, 9, 4, seed=3)
    assert chosen.shape == (9, 4)
    for turn in chosen.reshape(-1, 6):
        assert sorted(turn) == list(range(6))
    np.testing.assert_array_equal(chosen, training.schedule(6, 9, 4, seed=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_is_that_of_the_inputs_under_the_masks(family, tmp_path):
    model, parameters, hidden = tiny(tmp_path, family)
    definition, masks = model.block(), random_masks(model, parameters)
    for sub in model.sub_blocks:
        own = of(sub, masks)
        target = targets.same(definition, sub, parameters, hidden) * 1.1 + 0.2
        sparse = {path: jnp.where(mask.T, parameters[path], 0) for path, mask in own.items()}
        block, seen = definition.bind({**parameters, **sparse}), {}
        block.apply(sub.name, block.enter(sub.name, hidden[0]), seen.__setitem__)
        spread = np.asarray(hidden[0] + target[0], np.float64)
        spread = np.var(spread, -1) if family.startswith("opt") else np.mean(np.square(spread), -1)
        for entering, readers in layerwise.inputs(sub).items():
            x = np.asarray(seen[entering], np.float64).reshape(-1, parameters[readers[0]].shape[0])
            for weighting, weights in (("none", np.ones(len(x))), ("norm", 1 / spread.reshape(-1))):
                gram = layerwise.gram(definition, sub, entering, parameters, own, hidden, target, weighting)
                want = x.T @ (weights[:, None] * x)
                np.testing.assert_allclose(gram, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_a_mask_is_refined_with_the_shrinkage_that_is_best_on_other_samples():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(24, 24))
    fitted, judging = (rng.normal(size=(size, 24)) @ mixing for size in (30, 200))
    kernel, mask = rng.normal(size=(24, 8)), np.arange(24) % 2 == rng.integers(0, 2, (8, 1))

    def error(mask):
        return np.square(judging @ (np.where(mask.T, kernel, 0) - kernel)).sum()

    weights, kept = jnp.asarray(kernel, jnp.float32), jnp.asarray(mask)
    gram, other = (jnp.asarray(x.T @ x, jnp.float32) for x in (fitted, judging))
    assert layerwise.loss(weights, weights, kept, other) == pytest.approx(error(mask), rel=1e-4)
    new, shrinkage = refine_matrix(weights, weights, kept, gram, other, 20, of=0)
    found = {}
    for s in SHRINKAGES:
        found[s], *_ = make_swaps(weights, weights, kept, gram + s * jnp.diag(jnp.diagonal(gram)), jnp.int32(20))
    assert shrinkage == min(found, key=lambda s: error(np.asarray(found[s])))
    np.testing.assert_array_equal(new, found[shrinkage])
    assert error(np.asarray(new)) < error(mask)
    # Samples on which nothing is lost know nothing better.
    assert refine_matrix(weights, weights, kept, gram, jnp.zeros_like(other), 20, of=0) is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    for family in ("llama", "opt"):
        write_model(folder / family, family)
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (16, 24)))
    return folder


def pruned(inputs, out, *options, family="llama"):
    """Prune through the command line's entry; run.json, the new checkpoint's tensors, masks by name."""
    line = ["--ckpt", inputs / family, "--calibration", inputs / "ids.npy", "--samples", "16", "--length", "24"]
    prune.run([str(word) for word in (*line, "--out", out, *options)])
    masks = read_masks(out / "masks.safetensors")
    record = json.loads((out / "run.json").read_text())
    return record, load_file(out / "model.safetensors"), {name: masks.read(name) for name in masks.names()}


def sub_blocks(record):
    return [sub for block in record["blocks"] for sub in block["sub_blocks"]]


RECONSTRUCT = ("--reconstruct", "30", "--reconstruct-rate", "0.03", "--token-weighting", "norm")
RUNS = {
    "reconstruct": RECONSTRUCT,
    "same": (*RECONSTRUCT, "--target", "same", "--no-rebuild"),
    "all": (*RECONSTRUCT, "--reconstruct-scope", "all", "--rounds", "2", "--alpha", "0.2"),
    "2:4": (*RECONSTRUCT, "--pattern", "2:4", "--alpha", "auto", "--refine", "20"),
    "sparsegpt": (*RECONSTRUCT, "--method", "sparsegpt", "--no-rebuild"),
    "refine": ("--refine", "20", "--no-rebuild", "--token-weighting", "norm"),
    "auto": ("--alpha", "auto", "--granularity", "layer"),
}


QUICK = [("same", "llama"), ("2:4", "llama"), ("sparsegpt", "llama"), ("all", "opt")]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(RUNS, ("llama", "opt"))
    ],
)
def test_what_is_held_out_is_never_worse_and_zeros_are_exact(name, family, inputs, tmp_path):
    record, tensors, masks = pruned(inputs, tmp_path / "out", *RUNS[name], family=family)
    dense = load_file(inputs / family / "model.safetensors")
    moved = {matrix: (tensors[matrix] != dense[matrix])[mask].any() for matrix, mask in masks.items()}
    # Where training does no good on samples held out, a sub-block stays as it was.
    assert any(moved.values()) == (name not in ("auto", "refine"))
    for matrix, mask in masks.items():
        assert not tensors[matrix][~mask].any()
        if name == "2:4":
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
        elif name != "sparsegpt":
            assert (mask.sum(1) == mask.shape[1] // 2).all() or name == "auto"
    assert record["totals"]["sparsity"] == pytest.approx(0.5, abs=2e-3)
    subs = sub_blocks(record)
    for sub in subs:
        assert sub["validation_loss_after"] <= sub["validation_loss_before"] * (1 + 1e-6)
        if name == "auto":
            assert len(sub["alpha"]) == 1 and sub["alpha"][0] in ALPHAS
    assert any(sub["validation_loss_after"] < sub["validation_loss_before"] for sub in subs)
    if name in ("reconstruct", "same", "all"):
        assert sum(sub["loss_after"] for sub in subs) < 0.9 * sum(sub["loss_before"] for sub in subs)
    rest = {n for n in dense if n not in masks and not np.array_equal(dense[n], tensors[n])}
    if name == "all":
        assert rest and all("norm" in n or n.endswith("bias") for n in rest)
    else:
        assert not rest


def test_alpha_auto_takes_the_alpha_of_the_lowest_loss(inputs, tmp_path):
    """Of the first sub-block, where all runs see the same: its loss under every fixed alpha, held-out samples last."""
    common = ("--method", "magnitude", "--token-weighting", "norm", "--target", "same")
    record, _, _ = pruned(inputs, tmp_path / "auto", *common, "--alpha", "auto")
    first = sub_blocks(record)[0]
    checkpoint = open_checkpoint(str(inputs / "llama"))
    model = build_model(checkpoint.config, jnp.dtype("float32"))
    parameters = {
        path: jnp.asarray(value) for path, value in read_parameters(checkpoint, model.names.of_block(0)).items()
    }
    embedding = load_file(inputs / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    hidden = jnp.asarray(embedding[np.load(inputs / "ids.npy")])[None]
    definition, sub = model.block(), model.sub_blocks[0]
    fitted, judging = hidden[:, :14], hidden[:, 14:]
    start = {path: jnp.asarray(_by_magnitude(parameters[path].T)) for path in sub.kernels}
    totals = gradients.zero_totals(definition, sub)
    totals, _ = gradients.accumulate(definition, sub, parameters, {}, start, fitted, totals, "norm")
    importance, _ = gradients.importance(sub, totals, jnp.float32(14))
    scores = rebuild.scores(sub, parameters, importance, "wd")
    target = targets.same(definition, sub, parameters, judging)
    losses = {}
    for alpha in ALPHAS:
        pattern = PruneConfig(ckpt="x", out="y").sparsity_pattern
        masks = rebuild.swap_masks(sub, scores, start, jnp.float32(alpha), granularity="block", pattern=pattern)
        losses[alpha] = float(loss(definition, sub, parameters, masks, judging, target, "norm"))
    assert first["alpha"] == [min(losses, key=losses.get)]
    assert first["validation_loss_after"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert first["validation_loss_before"] == pytest.approx(losses[0.0], rel=1e-4)


def _by_magnitude(weight):
    order = np.argsort(np.abs(np.asarray(weight)), axis=None, kind="stable")
    mask = np.ones(weight.size, bool)
    mask[order[: weight.size // 2]] = False
    return mask.reshape(weight.shape)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--reconstruct", "-1"], "--reconstruct -1 must be at least 0"),
        (["--reconstruct", "1", "--reconstruct-rate", "0"], r"--reconstruct-rate 0 is outside \(0, 1\]"),
        (["--reconstruct", "1", "--reconstruct-rate", "nan"], "--reconstruct-rate nan is outside"),
        (["--reconstruct-batch", "0"], "--reconstruct-batch 0 must be at least 1"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--no-rebuild", "--rounds", "2"], "--rounds 2 needs a rebuild, --refine, --least-squares or --reconstruct"),
        (["--no-rebuild", "--alpha", "auto"], "--alpha auto needs a rebuild; leave out --no-rebuild"),
        (["--no-rebuild", "--metric", "w"], "--metric w needs a rebuild; leave out --no-rebuild"),
        (["--target", "same"], "--target same needs --alpha auto, --refine, --least-squares or --reconstruct"),
        (["--reconstruct-rate", "0.03"], "--reconstruct-rate 0.03 needs --reconstruct"),
        (["--refine", "5", "--reconstruct-batch", "2"], "--reconstruct-batch 2 needs --reconstruct"),
        (["--refine", "5", "--reconstruct-scope", "all"], "--reconstruct-scope all needs --reconstruct"),
        (["--refine", "-3"], "--refine -3 must be at least 0"),
        (["--refine", "3000000000"], "--refine 3000000000 is above 2147483647"),
        (["--reconstruct", "2147483648"], "--reconstruct 2147483648 is above 2147483647"),
        (["--reconstruct", "2", "--reconstruct-batch", "2147483648"], "--reconstruct-batch 2147483648 is above"),
        (["--rounds", "2147483648"], "--rounds 2147483648 is above"),
        (["--seed", "-1", "--reconstruct", "2"], "--seed -1 must be at least 0"),
        (["--alpha", "automatic"], "alpha"),
        (["--alpha", "1.5"], r"--alpha 1.5 is outside \[0, 1\]"),
        (["--token-weighting", "rms"], "token-weighting"),
        (["--target", "sparse"], "target"),
        (["--alpha", "auto", "--samples", "1"], "samples are held out for --alpha auto"),
    ],
)
def test_bad_options(options, complaint, inputs, tmp_path):
    with pytest.raises(BarberError, match=complaint):
        pruned(inputs, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_offloaded_and_smaller_micro_batches_train_alike(inputs, tmp_path):
    options = ("--reconstruct", "8", "--reconstruct-batch", "4", "--alpha", "0.2", "--refine", "5")
    _, whole, masks = pruned(inputs, tmp_path / "whole", *options, "--batch", "4")
    for name, others in {"away": ["--batch", "2", "--offload-activations"]}.items():
        _, tensors, again = pruned(inputs, tmp_path / name, *options, *others)
        same = sum((again[matrix] == mask).sum() for matrix, mask in masks.items())
        assert same >= 0.995 * sum(mask.size for mask in masks.values())
        for matrix, mask in masks.items():
            both = mask & again[matrix]
            assert np.median(np.abs(tensors[matrix] - whole[matrix])[both]) < 1e-3


def test_a_dense_sub_block_stays_as_it_is(inputs, tmp_path):
    """Nothing pruned, nothing lost: every choice is to leave it, also where it aims at the dense stream."""
    record, tensors, _ = pruned(inputs, tmp_path / "out", "--sparsity", "0", *RECONSTRUCT, "--alpha", "auto")
    dense = load_file(inputs / "llama" / "model.safetensors")
    assert all(sub["best_steps"] == [0] and sub["alpha"] == [0.0] for sub in sub_blocks(record))
    for name, tensor in dense.items():
        np.testing.assert_array_equal(tensors[name], tensor)
