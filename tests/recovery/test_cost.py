"""Operations and memory as arithmetic: against the shapes of a training that is never allocated, and in the docs."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from whole_models import plain_loss

from barber_jax.models import build_model
from barber_jax.recovery import cost, training
from barber_jax.recovery.objective import Objective
from barber_jax.recovery.program import BLOCKS, EMBED, HEAD, Program

DOCS = Path(__file__).parents[2] / "docs" / "recover.md"
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], max_position_embeddings=8192, hidden_act="silu")
SIZES = {
    "LLaMA 3.2 1B": dict(h=2048, ffn=8192, layers=16, heads=32, kv=8, vocabulary=128256, tied=True),
    "LLaMA 2 7B": dict(h=4096, ffn=11008, layers=32, heads=32, kv=32, vocabulary=32000, tied=False),
    "LLaMA 3 70B": dict(h=8192, ffn=28672, layers=80, heads=64, kv=8, vocabulary=128256, tied=False),
}
TINY = dict(h=256, ffn=512, layers=3, heads=4, kv=2, vocabulary=300, tied=False)
BUDGET = 72 * 2**30
"""Bytes of 80 GB that are planned with."""


def llama(h, ffn, layers, heads, kv, vocabulary, tied):
    sizes = dict(hidden_size=h, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    sizes |= dict(num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    return build_model({**LLAMA, **sizes}, jnp.dtype("bfloat16"))


def abstract(model, dtype="bfloat16"):
    """The parameters of a model and its masks as shapes."""
    shapes = {EMBED + path: shape for path, shape in model.embed().shapes}
    shapes |= {BLOCKS + path: (model.layers, *shape) for path, shape in model.block().shapes}
    shapes |= {HEAD + path: shape for path, shape in model.head().shapes}
    if model.tied_embedding:
        del shapes[f"{HEAD}lm_head.kernel"]
    parameters = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}
    kernels = Program.of(model).kernels
    return parameters, {name: jax.ShapeDtypeStruct(shapes[name], jnp.bool_) for name in kernels}


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("scope", ["weights", "all", "lora"])
@pytest.mark.parametrize("name", ["LLaMA 3.2 1B", "LLaMA 2 7B"])
def test_memory_is_that_of_the_shapes(name, scope):
    model = llama(**SIZES[name])
    parameters, masks = abstract(model)
    program = Program.of(model)
    trained, frozen = training.split(parameters, program, scope)
    plan = training.Plan(Objective(program, 0.0), 1.0)
    rank = 16 if scope == "lora" else 0
    state, _ = jax.eval_shape(lambda *given: training.begin(plan, *given, rank=rank), trained, frozen, masks)
    said = cost.memory(model, devices=1, micro_batch=1, length=2048, scope=scope, rank=16)
    assert said.masters == size(state.values)
    # Beside the moments the optimizer has a counter.
    assert said.moments == size(state.optimizer) - 4
    assert (said.masks, said.frozen, said.teacher) == (size(masks), size(frozen), size(parameters))
    many = cost.memory(model, devices=8, micro_batch=8, length=2048, scope=scope, rank=16)
    assert many.masters == said.masters // 8 and many.activations == said.activations
    assert said.total == sum(vars(said).values())


def test_products_are_kept_on_a_cpu_where_they_take_little():
    model = llama(**SIZES["LLaMA 3.2 1B"])
    given = dict(devices=1, micro_batch=4, length=512, compute="float32")
    kept = cost.kept_products(model, 2048, "float32")
    # q, k, v and o, gate and up of every block.
    assert kept == 4 * 2048 * 16 * (2048 + 512 + 512 + 2048 + 8192 + 8192)
    plain, light = (cost.memory(model, **given, remat=remat) for remat in ("all", "light"))
    assert light.total - plain.total == kept
    assert cost.choose_remat("cpu", model, **given) == "light"
    assert cost.choose_remat("gpu", model, **given) == "all"
    assert cost.choose_remat("cpu", model, **{**given, "micro_batch": 64}) == "all"
    # Factors have hardly any moments.
    assert cost.choose_remat("cpu", model, **given, scope="lora") == "all"
    assert cost.choose_remat("cpu", llama(**TINY), **given, scope="lora") == "light"


@pytest.mark.parametrize("teacher", [True, False])
def test_operations_are_those_that_xla_counts(teacher):
    model, length = llama(**TINY), 48
    parameters, _ = abstract(model, "float32")
    program = Program.of(model)

    def loss(values, dense, ids):
        return plain_loss(program, values, dense if teacher else {}, ids, 0.5)[0]

    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    counted = jax.jit(jax.grad(loss)).lower(parameters, parameters, ids).cost_analysis()["flops"] / (2 * length)
    passes = 4 if teacher else 3
    # Written plainly, attention is computed above its diagonal too.
    above = passes * model.layers * 2 * model.hidden * (length - 1)
    said = cost.operations_per_token(model, length, "all", teacher) + above
    # XLA counts elementwise operations too.
    assert 0.95 * said < counted < 1.1 * said
    less = cost.operations_per_token(model, length, "weights", teacher)
    assert said - above - less == 2 * TINY["h"] * TINY["vocabulary"]


def table():
    """Rows of the table of docs/recover.md: memory for each model on the least number of 80 GB devices."""
    rows = []
    for name, sizes in SIZES.items():
        model = llama(**sizes)
        for scope in ("weights", "lora"):
            given = dict(length=2048, scope=scope, rank=16)
            devices = next(
                n
                for n in (2**k for k in range(12))
                if cost.memory(model, devices=n, micro_batch=n, **given).total < BUDGET
            )
            said = cost.memory(model, devices=devices, micro_batch=devices, **given)
            state = said.masters + said.moments + said.gradients
            given = said.masks + said.frozen + said.teacher
            rest = said.gathered + said.activations + said.logits
            figures = [f"{value / 2**30:.1f}" for value in (state, given, rest, said.total)]
            rows.append(f"| {name} | {scope} | {devices} | {' | '.join(figures)} |")
    return rows


def test_the_table_in_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    missing = [row for row in table() if row not in text]
    assert not missing, "\n".join(["not in docs/recover.md:", *missing])
