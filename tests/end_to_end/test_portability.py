"""Every jitted function of the method can be compiled for CPU, NVIDIA GPU and TPU: lowered for each from this machine,
at the shapes of real models, without their memory."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import export

from barber_jax.criteria import CRITERIA, alps, owl, sparsegpt, starting
from barber_jax.forward import passes, perplexity
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selector import Selector
from barber_jax.models import build_model
from barber_jax.models.sharding import kernel_axes
from barber_jax.stages import exact_swaps, gradients, layerwise, loss, rebuild, targets, training
from barber_jax.stages.weights import surviving_weights

PLATFORMS = ("cpu", "cuda", "tpu")
MODELS = {
    "llama-3-8b": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
        "rope_theta": 500000.0,
    },
    "opt-6.7b": {
        **{"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "vocab_size": 50272},
        **{"num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 4096},
    },
}
M, B, L = 2, 2, 2048


def like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def lower(function, *arguments):
    """Lower for all platforms; the shapes of what it returns."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert set(exported.platforms) == set(PLATFORMS)
    return exported.out_avals


@pytest.fixture(
    params=[
        ("llama-3-8b", "float32"),
        ("opt-6.7b", "bfloat16"),
        pytest.param(("llama-3-8b", "bfloat16"), marks=pytest.mark.slow),
        pytest.param(("opt-6.7b", "float32"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def model(request):
    name, dtype = request.param
    return build_model(MODELS[name], jnp.dtype(dtype)), jnp.dtype(dtype)


def parameters(definition, dtype):
    return {path: like(shape, dtype) for path, shape in definition.shapes}


def test_streams(model):
    model, dtype = model
    stream = like((M, B, L, model.hidden), dtype)
    embed, head, block = model.embed(), model.head(), model.block()
    ids = like((M, B, L), jnp.int32)
    (embedded,) = lower(lambda p, i: passes.embed(embed, p, i), parameters(embed, dtype), ids)
    assert embedded.shape == stream.shape
    masks = {path: like(dict(block.shapes)[path][::-1], bool) for sub in block.sub_blocks for path in sub.kernels}
    lower(lambda p, m, s: passes.propagate(block, p, m, s), parameters(block, dtype), masks, stream)
    for method in ("wanda", "sparsegpt"):
        statistic = CRITERIA[method].statistic
        lower(lambda p, s, f=statistic: passes.statistics(block, f, p, s), parameters(block, dtype), stream)
    lower(lambda p, h: passes.head(head, p, h), parameters(head, dtype), like((1, 256, model.hidden), dtype))
    lower(lambda p, h, i: perplexity.window_losses(head, p, h, i), parameters(head, dtype), stream, ids)


@pytest.mark.parametrize("place", [0, 1])
def test_rebuild(model, place):
    model, dtype = model
    block = model.block()
    sub, shapes = block.sub_blocks[place], dict(block.shapes)
    stream, weights = like((M, B, L, model.hidden), dtype), parameters(block, dtype)
    kernels = {path: weights[path] for path in sub.kernels}
    masks = {path: like(shapes[path][::-1], bool) for path in sub.kernels}
    squares = {path: like((1, *shapes[path])) for path in sub.kernels}
    totals = (squares, like((1,)))

    def accumulate(parameters, masks, stream, totals):
        totals, dense = gradients.accumulate(block, sub, parameters, {}, masks, stream, gradients.Totals(*totals))
        return totals.squares, totals.errors, dense

    lower(lambda: gradients.zero_totals(block, sub).squares)
    lower(accumulate, weights, masks, stream, totals)
    lower(lambda t: gradients.importance(sub, gradients.Totals(*t), jnp.float32(4)), totals)
    lower(surviving_weights, kernels, kernels, masks)
    importance = {path: like(shapes[path]) for path in sub.kernels}
    scores = lower(lambda w, d: rebuild.scores(sub, w, d, "wd"), kernels, importance)
    assert len(scores) == len(masks)
    scores = {path: like(mask.shape) for path, mask in masks.items()}
    settings = [(granularity, SparsityPattern(0.5)) for granularity in ("output1", "input1", "layer", "block")]
    for granularity, pattern in [*settings, ("output1", SparsityPattern(0.5, 2, 4))]:
        for how in ("count", "top_k"):
            swap = partial(rebuild.swap_masks, sub, granularity=granularity, pattern=pattern, selection=how)
            lower(swap, scores, masks, like(()))
    lower(lambda p, m, d, s: loss.advance(block, sub, p, m, d, s), weights, masks, stream, stream)


@pytest.mark.parametrize("place", [0, 1])
def test_stages(model, place):
    model, dtype = model
    block = model.block()
    sub, shapes = block.sub_blocks[place], dict(block.shapes)
    stream, weights = like((M, B, L, model.hidden), dtype), parameters(block, dtype)
    masks = {path: like(shapes[path][::-1], bool) for path in sub.kernels}
    lower(lambda p, s: targets.same(block, sub, p, s), weights, stream)
    lower(lambda p, d, s: targets.dense(block, sub, p, d, s), weights, stream, stream)
    lower(lambda p, m, s, t: loss.loss(block, sub, p, m, s, t, "norm"), weights, masks, stream, stream)
    for entering, (path, *_) in layerwise.inputs(sub).items():
        inputs, outputs = shapes[path]
        arguments = (weights, masks, stream, stream)
        (gram,) = lower(
            lambda p, m, s, t, name=entering: layerwise.gram(block, sub, name, p, m, s, t, "norm"), *arguments
        )
        assert gram.shape == (inputs, inputs)
        kernel, mask, count = like(shapes[path], dtype), like((outputs, inputs), bool), like((), jnp.int32)
        lower(layerwise.loss, kernel, kernel, mask, gram)
        for of in (0, 4):
            lower(
                lambda k, d, m, g, n, of=of: exact_swaps.make_swaps(k, d, m, g, n, of=of),
                kernel,
                kernel,
                mask,
                gram,
                count,
            )
    plan = training.Plan(100, 0.01, "norm")
    paths = training.trained_paths(block, sub, "all")
    values = {path: weights[path] for path in paths}

    def train(values, parameters, masks, stream, target, order):
        state = training.begin(sub, plan, values, masks)
        return training.train(block, sub, plan, parameters, masks, stream, target, order, state).values

    lower(train, values, weights, masks, stream, stream, like((5, 2, 2, 2), jnp.int32))


def test_outliers_of_a_block(model):
    model, dtype = model
    block = model.block()
    weights, shapes = parameters(block, dtype), dict(block.shapes)
    linears = [pair for sub in block.sub_blocks for pair in sub.linears]
    seen = {entering: like(shapes[f"{linear}.kernel"][:1]) for linear, entering in linears}
    lower(lambda p, s, t: owl.count_outliers(block.sub_blocks, p, s, t), weights, seen, like(()))


@pytest.mark.parametrize("pattern", [SparsityPattern(0.5), SparsityPattern(0.5, 2, 4)], ids=str)
@pytest.mark.parametrize("select", [Selector("count"), Selector("top_k")], ids=lambda select: select.preferred)
def test_starting_criteria(model, pattern, select):
    model, dtype = model
    block = model.block()
    shapes = dict(block.shapes)
    for sub in block.sub_blocks:
        for path in sub.kernels:
            inputs = shapes[path][0]
            prepared = {
                "magnitude": None,
                "wanda": like((inputs,)),
                "gblm": (like((inputs,)), like(shapes[path])),
                "sparsegpt": (like((inputs, inputs)), like((inputs,), bool)),
                "alps": alps.Layer(
                    gram=like((inputs, inputs)),
                    added=like((inputs,)),
                    scale=like((inputs,)),
                    vectors=like((inputs, inputs)),
                    values=like((inputs,)),
                    dead=like((inputs,), bool),
                ),
            }
            for method, statistic in prepared.items():
                start = partial(starting._start_matrix, CRITERIA[method], kernel_axes(sub, path))
                quota = CRITERIA[method].quota(shapes[path][::-1], 0.5)
                lower(
                    lambda kernel, seen, quota, start=start: start(kernel, seen, 128, pattern, quota, select)[0],
                    like(shapes[path], dtype),
                    statistic,
                    () if pattern.structured else tuple(like((), jnp.int32) for _ in quota),
                )
    lower(lambda gram, damping: sparsegpt.inverse_factor(gram, 128, damping), like((4096, 4096)), like(()))
    lower(lambda gram: alps.decompose(gram, 128), like((4096, 4096)))
