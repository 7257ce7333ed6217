"""Floating-point operations that the method needs, counted from shapes. A multiply-add counts two.

Counted is what a result needs and not what a program happens to do, so that wasted work shows as low efficiency. Only
products of matrices count; what is done weight by weight (selection, norms, activations) counts as nothing.
"""

from collections.abc import Iterator

from barber_jax.config import PruneConfig
from barber_jax.models.decoder import SubBlock
from barber_jax.models.family import Model
from barber_jax.stages import held_out_samples
from barber_jax.stages.layerwise import inputs
from barber_jax.stages.rebuild import ALPHAS
from barber_jax.stages.reconstruct import VALIDATIONS
from barber_jax.stages.refine import SHRINKAGES


def attention_products(model: Model, samples: int, length: int) -> int:
    """Causal scores and mixtures together: 4 x query features x L (L + 1) / 2 a sample. A sliding window is not
    taken into account: where it is shorter than the sample, fewer are needed."""
    shapes = dict(model.block().shapes)
    features = shapes["self_attn.q_proj.kernel"][1]
    return samples * 4 * features * length * (length + 1) // 2


def _linear(model: Model, path: str, tokens: int) -> int:
    inputs, outputs = dict(model.block().shapes)[path]
    return 2 * tokens * inputs * outputs


def forward(model: Model, sub: SubBlock, samples: int, length: int) -> int:
    """One forward of a sub-block."""
    linears = sum(_linear(model, path, samples * length) for path in sub.kernels)
    return linears + (attention_products(model, samples, length) if sub.name == "self_attn" else 0)


def gradient(model: Model, sub: SubBlock, samples: int, length: int) -> int:
    """A sparse and a dense forward of a sub-block, and the backward: weight gradients of every linear, activation
    gradients through the last linear and attention (twice its products), none for the sub-block's input."""
    tokens = samples * length
    weights = sum(_linear(model, path, tokens) for path in sub.kernels)
    inside = sum(_linear(model, path, tokens) for path in sub.kernels if not sub.splits_outputs(path))
    attention = 2 * attention_products(model, samples, length) if sub.name == "self_attn" else 0
    return 2 * forward(model, sub, samples, length) + weights + inside + attention


def of_start(model: Model, method: str, samples: int, length: int) -> int:
    """Starting mask of a block: for a criterion that looks at activations a forward without the block's last linear;
    for sparsegpt also, approximately, X^T X and two triangular factors of each input (a Cholesky factor and an inverse,
    I^3 / 3 each), and the updates of the columns after each (I^2 O)."""
    if method == "magnitude":
        return 0
    total = sum(forward(model, sub, samples, length) for sub in model.sub_blocks)
    total -= _linear(model, model.sub_blocks[-1].kernels[-1], samples * length)
    if method == "sparsegpt":
        shapes = dict(model.block().shapes)
        inputs = {entering: shapes[f"{name}.kernel"][0] for sub in model.sub_blocks for name, entering in sub.linears}
        total += sum(2 * samples * length * size**2 + 2 * size**3 // 3 for size in inputs.values())
        total += sum(shapes[path][0] ** 2 * shapes[path][1] for sub in model.sub_blocks for path in sub.kernels)
    return total


def of_block(model: Model, config: PruneConfig, last: bool) -> dict[str, int]:
    """Operations of every stage of a block, by the names that run.json has for them."""
    samples, length = config.samples, config.length
    stages = {"start": of_start(model, config.method or "magnitude", samples, length)}
    if stages["start"] and not last:
        stages["propagate"] = sum(forward(model, sub, samples, length) for sub in model.sub_blocks)
    if config.runs_stages:
        for sub in model.sub_blocks:
            stages |= of_stages(model, sub, config)
    return stages


def of_stages(model: Model, sub: SubBlock, config: PruneConfig) -> dict[str, int]:
    """What follows the starting masks of a sub-block, all rounds together."""
    held_out = held_out_samples(config, config.samples, 1)
    training, validation = config.samples - held_out, forward(model, sub, held_out, config.length)
    counts = {"propagate": forward(model, sub, config.samples, config.length)}
    if held_out or not config.rebuild:
        counts["target"] = counts["loss"] = counts["propagate"]
    if config.rebuild:
        counts["gradient"] = config.rounds * gradient(model, sub, training, config.length)
    if config.rebuild and config.alpha == "auto":
        counts["swap"] = config.rounds * len(ALPHAS) * validation
    if config.refine:
        counts["refine"] = config.rounds * (refine(model, sub, config) + 2 * validation)
    if config.reconstruct:
        seen = config.reconstruct * config.reconstruct_batch
        # As for the rebuild, less its sparse forward.
        steps = gradient(model, sub, seen, config.length) - forward(model, sub, seen, config.length)
        counts["reconstruct"] = config.rounds * (steps + (min(VALIDATIONS, config.reconstruct) + 1) * validation)
    return {f"{sub.name} {stage}": count for stage, count in counts.items()}


def refine(model: Model, sub: SubBlock, config: PruneConfig) -> int:
    """Gram matrices of a sub-block's inputs, each from a forward of its own, and what every matrix loses under its mask
    and under the one of every shrinkage; swaps are no products."""
    shapes, tokens = dict(model.block().shapes), config.samples * config.length
    sizes = [shapes[paths[0]][0] for paths in inputs(sub).values()]
    grams = sum(2 * tokens * size**2 for size in sizes)
    passes = len(sizes) * forward(model, sub, config.samples, config.length)
    losses = (1 + len(SHRINKAGES)) * sum(2 * shapes[path][0] ** 2 * shapes[path][1] for path in sub.kernels)
    return passes + grams + losses


def of_run(model: Model, config: PruneConfig) -> dict[str, int]:
    """Operations of every stage, all blocks together."""
    total: dict[str, int] = {}
    for block in _blocks(model, config):
        for stage, operations in block.items():
            total[stage] = total.get(stage, 0) + operations
    return total


def _blocks(model: Model, config: PruneConfig) -> Iterator[dict[str, int]]:
    for index in range(model.layers):
        yield of_block(model, config, last=index + 1 == model.layers)
