"""Count the floating-point operations that each stage of the method needs, from shapes; a multiply-add counts as two.

The count is what the result requires, not what the compiled program executes, so that wasted work shows up as low
efficiency. Only matrix products are counted; elementwise work (selection, norms, activations) is not.
"""

from barber_jax.config import PruneConfig
from barber_jax.criteria import CRITERIA, alps
from barber_jax.models.decoder import SubBlock
from barber_jax.models.family import Model
from barber_jax.stages import held_out_samples
from barber_jax.stages.layerwise import inputs
from barber_jax.stages.least_squares import DAMPINGS
from barber_jax.stages.rebuild import ALPHAS
from barber_jax.stages.reconstruct import VALIDATIONS
from barber_jax.stages.refine import SHRINKAGES

ADMM_STEPS = 40
"""Steps of alps until the support settles, approximately: the count depends on the data."""


def attention_operations(model: Model, samples: int, length: int) -> int:
    """Operations of Q K^T and of the product with V in one causal forward pass: 4 x query features x L (L + 1) / 2 for
    each sample.

    A sliding window is ignored; where it is shorter than the sample, the count is too high.
    """
    shapes = dict(model.block().shapes)
    features = shapes["self_attn.q_proj.kernel"][1]
    return samples * 4 * features * length * (length + 1) // 2


def _linear_operations(model: Model, path: str, tokens: int) -> int:
    """Operations of X W for one linear; X is [tokens, in]."""
    inputs, outputs = dict(model.block().shapes)[path]
    return 2 * tokens * inputs * outputs


def forward_operations(model: Model, sub: SubBlock, samples: int, length: int) -> int:
    """Operations of one forward pass of a sub-block."""
    linears = sum(_linear_operations(model, path, samples * length) for path in sub.kernels)
    return linears + (attention_operations(model, samples, length) if sub.name == "self_attn" else 0)


def gradient_operations(model: Model, sub: SubBlock, samples: int, length: int) -> int:
    """Operations of the sparse forward, dense forward and backward pass of a sub-block.

    The backward pass needs the weight gradients of all linears, and activation gradients through the output linear and
    attention (twice its products); the gradient of the sub-block's input is not needed.
    """
    tokens = samples * length
    weight_gradients = sum(_linear_operations(model, path, tokens) for path in sub.kernels)
    # Linears that do not read the sub-block's own input pass a gradient on to their input.
    activation_gradients = sum(
        _linear_operations(model, path, tokens) for path in sub.kernels if not sub.splits_outputs(path)
    )
    attention = 2 * attention_operations(model, samples, length) if sub.name == "self_attn" else 0
    return 2 * forward_operations(model, sub, samples, length) + weight_gradients + activation_gradients + attention


def starting_mask_operations(model: Model, method: str, samples: int, length: int) -> int:
    """Operations of the starting mask of one block.

    magnitude needs no matrix product. wanda and gblm need a forward pass up to the input of the block's last linear,
    gblm after `sweep_operations`. sparsegpt needs in addition, approximately, X^T X, two triangular factors for each
    input of I features (a Cholesky factor and an inverse, I^3 / 3 each), and the updates of the columns that follow
    each pruned one (I^2 O). alps needs instead, approximately, X^T X, the eigenvectors for each input (4 I^3 / 3 to
    tridiagonal form and 2 I^3 back), two products (2 I^2 O each) in each of `ADMM_STEPS`, and one in each step of
    conjugate gradients and before them.
    """
    if method == "magnitude":
        return 0
    total = sum(forward_operations(model, sub, samples, length) for sub in model.sub_blocks)
    total -= _linear_operations(model, model.sub_blocks[-1].kernels[-1], samples * length)
    if method in ("sparsegpt", "alps"):
        shapes = dict(model.block().shapes)
        input_sizes = {
            entering: shapes[f"{name}.kernel"][0] for sub in model.sub_blocks for name, entering in sub.linears
        }
        thirds, products = (2, 0.5) if method == "sparsegpt" else (10, 2 * ADMM_STEPS + alps.SOLVER_STEPS + 1)
        total += sum(2 * samples * length * size**2 + thirds * size**3 // 3 for size in input_sizes.values())
        kernels = [shapes[path] for sub in model.sub_blocks for path in sub.kernels]
        total += sum(int(products * 2 * inputs**2 * outputs) for inputs, outputs in kernels)
    return total


def sweep_operations(model: Model, samples: int, length: int, weights: bool = True) -> int:
    """Operations of the backward sweep through the dense model, with every stream kept.

    Args:
        weights: whether the gradients of weights are wanted, besides those of the linears' outputs.

    Each block needs a forward pass to the end of the model, another one for its own backward pass, and in that the
    gradients of the weights and of the activations: as much as two. The head needs logits and the gradient of its
    input.
    """
    block = 4 * sum(forward_operations(model, sub, samples, length) for sub in model.sub_blocks)
    if not weights:
        kernels = [path for sub in model.sub_blocks for path in sub.kernels]
        block -= sum(_linear_operations(model, path, samples * length) for path in kernels)
    inputs, outputs = dict(model.head().shapes)["lm_head.kernel"]
    return model.layers * block + 2 * 2 * samples * length * inputs * outputs


def block_operations(model: Model, config: PruneConfig, last: bool) -> dict[str, int]:
    """Operations of every stage of one block, keyed as `seconds` of a block in run.json is.

    Args:
        last: whether it is the model's last block, after which stream A is not propagated.
    """
    samples, length = config.samples, config.length
    counts = {"start": starting_mask_operations(model, config.method or "magnitude", samples, length)}
    if counts["start"] and not last:
        counts["propagate"] = sum(forward_operations(model, sub, samples, length) for sub in model.sub_blocks)
    if config.runs_stages:
        for sub in model.sub_blocks:
            counts |= stage_operations(model, sub, config)
    return counts


def stage_operations(model: Model, sub: SubBlock, config: PruneConfig) -> dict[str, int]:
    """Operations of the stages of one sub-block after its starting mask, summed over rounds."""
    held_out = held_out_samples(config, config.samples, 1)
    training, validation = config.samples - held_out, forward_operations(model, sub, held_out, config.length)
    counts = {"propagate": forward_operations(model, sub, config.samples, config.length)}
    if held_out or not config.rebuild:
        counts["target"] = counts["loss"] = counts["propagate"]
    if config.rebuild:
        counts["gradient"] = config.rounds * gradient_operations(model, sub, training, config.length)
    if config.rebuild and config.alpha == "auto":
        counts["swap"] = config.rounds * len(ALPHAS) * validation
    if config.refine:
        counts["refine"] = config.rounds * (refine_operations(model, sub, config) + 2 * validation)
    if config.least_squares:
        solving = least_squares_operations(model, sub, config, training)
        counts["least squares"] = config.rounds * (solving + (1 + len(DAMPINGS)) * len(inputs(sub)) * validation)
    if config.reconstruct:
        samples = config.reconstruct * config.reconstruct_batch
        # As for the rebuild, but with one forward pass instead of two.
        steps = gradient_operations(model, sub, samples, config.length)
        steps -= forward_operations(model, sub, samples, config.length)
        counts["reconstruct"] = config.rounds * (steps + (min(VALIDATIONS, config.reconstruct) + 1) * validation)
    return {f"{sub.name} {stage}": count for stage, count in counts.items()}


def refine_operations(model: Model, sub: SubBlock, config: PruneConfig) -> int:
    """Operations of one round of `--refine` on a sub-block, without validation losses.

    Each distinct input of its linears, or with weights by gradients each linear, needs a forward pass and a Gram
    matrix; each kernel needs its layer-wise error under the current mask and under the mask of every shrinkage. Swaps
    need no matrix product.
    """
    shapes, tokens = dict(model.block().shapes), config.samples * config.length
    by_linear = config.needs_token_weights
    sizes = [shapes[path][0] for paths in inputs(sub).values() for path in (paths if by_linear else paths[:1])]
    grams = sum(2 * tokens * size**2 for size in sizes)
    forwards = len(sizes) * forward_operations(model, sub, config.samples, config.length)
    errors = (1 + len(SHRINKAGES)) * sum(2 * shapes[path][0] ** 2 * shapes[path][1] for path in sub.kernels)
    return forwards + grams + errors


def least_squares_operations(model: Model, sub: SubBlock, config: PruneConfig, samples: int) -> int:
    """Operations of one round of `--least-squares` on a sub-block, without validation losses.

    Each distinct input needs a forward pass and a Gram matrix, the last one also the product with what the output
    lacks; each kernel needs, for every damping, a product with the Gram matrix in each step, and all but the last
    kernel one more before them.
    """
    shapes, tokens = dict(model.block().shapes), samples * config.length
    *_, last = sub.kernels
    sizes = [shapes[paths[0]][0] for paths in inputs(sub).values()]
    grams = sum(2 * tokens * size**2 for size in sizes)
    forwards = len(sizes) * forward_operations(model, sub, samples, config.length)
    products = {path: len(DAMPINGS) * (config.least_squares + 1) for path in sub.kernels}
    lacking = 0
    if sub.ends_in_linear:
        products[last] -= len(DAMPINGS)
        lacking = 2 * tokens * shapes[last][0] * model.hidden
    solving = sum(count * 2 * shapes[path][0] ** 2 * shapes[path][1] for path, count in products.items())
    return forwards + grams + lacking + solving


def run_operations(model: Model, config: PruneConfig) -> dict[str, int]:
    """Operations of every stage, summed over blocks, and of `gradients` of the dense model where they are needed."""
    total: dict[str, int] = {}
    if config.method and CRITERIA[config.method].gradients:
        total["gradients"] = sweep_operations(model, config.samples, config.length)
    if config.needs_token_weights:
        tokens = sweep_operations(model, config.samples, config.length, weights=False)
        total["gradients"] = total.get("gradients", 0) + tokens
    for index in range(model.layers):
        for stage, count in block_operations(model, config, last=index + 1 == model.layers).items():
            total[stage] = total.get(stage, 0) + count
    return total
