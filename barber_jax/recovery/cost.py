"""Operations and memory of a recovery, as arithmetic on shapes; a multiply-add counts as two operations."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from barber_jax.forward.passes import HEAD_TOKENS
from barber_jax.models.family import Model
from barber_jax.recovery.program import Remat
from barber_jax.recovery.training import Scope

FLOAT = 4
SMALL_MEMORY = 2**30
"""Bytes on a CPU that products of linears may always take."""


def operations_per_token(model: Model, length: int, scope: Scope, teacher: bool) -> int:
    """Operations of matrix products that training on one token needs, of a window of `length`.

    Of the sparse model a forward pass and its gradient, twice a forward pass where a matrix is trained; of the teacher
    a forward pass. What is computed a second time to save memory is not counted, nor is elementwise work.
    """
    shapes = dict(model.block().shapes)
    kernels = [shapes[path] for sub in model.sub_blocks for path in sub.kernels]
    # Of low-rank factors, gradients of the merged kernels are needed first.
    linears = 2 * model.layers * sum(math.prod(shape) for shape in kernels)
    attention = model.layers * 2 * shapes["self_attn.q_proj.kernel"][1] * (length + 1)
    head = 2 * math.prod(dict(model.head().shapes)["lm_head.kernel"])
    passes = 4 if teacher else 3
    heads = passes - (scope != "all")
    return passes * linears + passes * attention + heads * head


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by what they are for."""

    masters: int
    moments: int
    gradients: int
    masks: int
    frozen: int
    teacher: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(vars(self).values())


def memory(
    model: Model,
    *,
    devices: int,
    micro_batch: int,
    length: int,
    scope: Scope = "weights",
    rank: int = 16,
    stored: str = "bfloat16",
    compute: str = "bfloat16",
    teacher: bool = True,
    remat: Remat = "all",
) -> Memory:
    """Memory that a step needs on each device, as the shapes give it; what a compiler adds is not in it.

    Args:
        devices: number of devices over which parameters and samples are sharded.
        micro_batch: windows computed at a time, on all devices together.
        length: tokens in a window.
        rank: of the factors for `lora`.
        stored: dtype of the checkpoints.
        compute: dtype of activations.
        teacher: whether there is one.
        remat: "all" or "light".
    """
    block, head = dict(model.block().shapes), dict(model.head().shapes)
    kernels = {path for sub in model.sub_blocks for path in sub.kernels}
    pruned = model.layers * sum(math.prod(block[path]) for path in kernels)
    layer = sum(math.prod(shape) for shape in block.values())
    whole = model.layers * layer + sum(math.prod(shape) for _, shape in (*model.embed().shapes, *head.items()))
    if model.tied_embedding:
        whole -= math.prod(head["lm_head.kernel"])
    factors = model.layers * rank * sum(sum(block[path]) for path in kernels)
    trained = {"weights": pruned, "all": whole, "lora": factors}[scope]
    frozen = {"weights": whole - pruned, "all": 0, "lora": whole}[scope]
    size, width = jnp.dtype(stored).itemsize, jnp.dtype(compute).itemsize
    tokens = -(-micro_batch // devices) * length
    vocabulary = math.prod(head["lm_head.kernel"])
    products = kept_products(model, tokens, compute) if remat == "light" else 0
    # Where it is trained, the head is float32 and has a gradient.
    heads = vocabulary * ((2 * FLOAT if scope == "all" else size) + size * teacher)
    return Memory(
        masters=FLOAT * trained // devices,
        moments=2 * FLOAT * trained // devices,
        # The sum over micro-batches, and one micro-batch's.
        gradients=2 * FLOAT * trained // devices,
        masks=pruned // devices,
        frozen=size * frozen // devices,
        teacher=size * whole // devices if teacher else 0,
        # One block and its gradient, for factors their product and the merged block too; and the heads.
        gathered=(4 if scope == "lora" else 2) * FLOAT * layer + (heads if devices > 1 else 0),
        # The input of every block, and one block's own activations, about 12 of the hidden size and 6 of the MLP's.
        activations=products + width * tokens * (model.hidden * (model.layers + 12) + 6 * _widest(block)),
        logits=FLOAT * HEAD_TOKENS * model.vocabulary * (5 if teacher else 3),
    )


def kept_products(model: Model, tokens: int, compute: str) -> int:
    """Bytes that the products of linears take which `remat="light"` keeps for the gradient.

    Args:
        tokens: of a device in a micro-batch.
        compute: dtype of activations.
    """
    shapes = dict(model.block().shapes)
    kernels = [path for sub in model.sub_blocks for path in sub.kernels]
    # The gradient does not need what the last one computes: it is only added to the hidden state.
    outputs = sum(shapes[path][1] for path in kernels[:-1])
    return jnp.dtype(compute).itemsize * model.layers * tokens * outputs


def choose_remat(platform: str, model: Model, *, devices: int, micro_batch: int, length: int, **given: Any) -> Remat:
    """What `--remat auto` is: "light" on a CPU, unless that takes much memory; elsewhere "all".

    Much is more than `SMALL_MEMORY`, and more than masters, moments and gradients together.

    Args:
        platform: of the devices.
        given: other arguments of `memory`.
    """
    said = memory(model, devices=devices, micro_batch=micro_batch, length=length, **given)
    kept = kept_products(model, -(-micro_batch // devices) * length, given.get("compute", "bfloat16"))
    fits = kept <= max(SMALL_MEMORY, said.masters + said.moments + said.gradients)
    return "light" if platform == "cpu" and fits else "all"


def _widest(shapes: dict[str, tuple[int, ...]]) -> int:
    return max(shape[1] for path, shape in shapes.items() if path.endswith(".kernel"))
