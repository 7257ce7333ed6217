"""Perplexity by the convention of the pruning literature (GPTQ, SparseGPT, Wanda).

The text is tokenized whole and cut into consecutive windows of L tokens from its start; a last incomplete window is
dropped. Each window is scored by itself: the mean cross-entropy of its L-1 next-token predictions. Perplexity is
exp(mean over windows). Texts: wikitext2 is the raw test split joined by blank lines; ptb the test sentences joined by a
space; c4 the first 1100 documents of the first validation shard joined by a space, of which 256 windows are used. A
local file's documents are joined by blank lines.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from barber_jax.config import ComputeDtype, parse_mesh
from barber_jax.console.command import parse, set_compilation_cache, set_precision
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.convert.checkpoint import Checkpoint, open_checkpoint
from barber_jax.convert.export import writing
from barber_jax.convert.parameters import check_tensors
from barber_jax.data import text
from barber_jax.data.calibration import check_ids, load_ids
from barber_jax.devices.mesh import DATA, Devices, constrain
from barber_jax.forward.dense import final_hidden, on_devices
from barber_jax.forward.passes import Parameters, default_batch
from barber_jax.models import build_model
from barber_jax.models.decoder import Definition
from barber_jax.models.family import Model

# The loss of this many tokens is taken at a time, so that logits over a large vocabulary stay small.
HEAD_TOKENS = 256
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


@dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity of a checkpoint: consecutive windows, mean cross-entropy, exponentiated."""

    ckpt: str
    """Checkpoint to evaluate: a Hugging Face folder, a Hub id, or a .gguf file."""
    length: int
    """Tokens in a window (L); each gives L-1 predictions."""
    text: tuple[Path, ...] = ()
    """Texts: .txt, .jsonl, .parquet, .arrow or a saved dataset folder; each is measured by itself."""
    tokens: tuple[Path, ...] = ()
    """Token ids: .npy of integers, flattened."""
    dataset: tuple[Literal["wikitext2", "ptb", "c4"], ...] = ()
    """Texts from the Hub."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    windows: int | None = None
    """How many windows of each text. Default: all (c4: 256)."""
    batch: int | None = None
    """Windows in a micro-batch. Default: 8; on CPU as many as make about 1024 tokens."""
    mesh: str | None = None
    """Devices: data=N,model=M spreads windows over N and linears over M. Default: one device."""
    offload_activations: bool = False
    """Keep the activations of all windows in host memory; a micro-batch at a time is on the device."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products."""
    json: Path | None = None
    """Also write the result to this file. As perplexity.json beside a run.json, a study finds it."""

    def __post_init__(self):
        if not (self.text or self.tokens or self.dataset):
            raise BarberError("nothing to measure on; give --text, --tokens or --dataset")
        parse_mesh(self.mesh)
        if self.length < 2:
            raise BarberError(f"--length {self.length} leaves no next token; use at least 2")
        for option in ("windows", "batch"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise BarberError(f"--{option} {value} must be at least 1")


def evaluation_ids(
    checkpoint: Checkpoint, *, path: Path | None, dataset: str | None, text_field: str = "text"
) -> np.ndarray:
    """All token ids of an evaluation text, int32 [tokens], by the conventions above. Give `path` or `dataset`.

    Raises:
        BarberError: the text cannot be read, or there is no tokenizer.
    """
    if path is not None:
        whole = "\n\n".join(text.read_documents(path, text_field))
    elif dataset == "c4":
        documents = text.hub_documents("c4", "validation")
        whole = " ".join(documents[i] for i in range(min(C4_DOCUMENTS, len(documents))))
    else:
        whole = {"wikitext2": "\n\n", "ptb": " "}[dataset].join(text.hub_documents(dataset, "test"))
    return text.tokenize(checkpoint.tokenizer(), whole)


def cut_windows(ids: np.ndarray, length: int, windows: int | None, source: str, vocabulary: int) -> np.ndarray:
    """Consecutive windows from the start: [tokens] -> int32 [windows, length].

    Raises:
        BarberError: the text is too short for that many, or for one; an id outside [0, vocabulary).
    """
    whole = ids.size // length
    wanted = whole if windows is None else windows
    if wanted < 1 or wanted > whole:
        raise BarberError(
            f"{source}: {ids.size} tokens give {whole} windows of --length {length}, not {max(wanted, 1)}; "
            "ask for fewer windows, lower --length or give more text"
        )
    cut = np.asarray(ids).reshape(-1)[: wanted * length].reshape(wanted, length)
    # In the ids' own dtype: an id too large for int32 would come round to a small one.
    check_ids(source, cut, vocabulary)
    return cut.astype(np.int32)


@partial(jax.jit, static_argnames="definition")
def window_losses(definition: Definition, parameters: Parameters, hidden: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of each window, in nats.

    Args:
        definition, parameters: the head.
        hidden: [M, B, L, D] final hidden states. ids: int32 [M, B, L].

    Returns:
        float32 [M * B].
    """
    head = definition.bind(parameters)
    batch, length = ids.shape[1:]
    step = max(1, min(HEAD_TOKENS // batch, length))
    padding = -length % step
    # Position t predicts token t + 1; the last position, and what pads it to whole steps, predicts nothing.
    targets = jnp.pad(ids[:, :, 1:], ((0, 0), (0, 0), (0, 1 + padding)))
    weight = jnp.arange(length + padding) < length - 1

    def part(piece: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """Summed losses [B] of a step's tokens [B, step]."""
        states, wanted, counts = piece
        scores = head(constrain(states, DATA)).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, wanted)
        return jnp.sum(jnp.where(counts, loss, 0.0), axis=1)

    def micro_batch(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states = jnp.pad(pair[0], ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, step, pair[0].shape[-1])
        wanted = pair[1].reshape(batch, -1, step)
        pieces = (jnp.moveaxis(states, 1, 0), jnp.moveaxis(wanted, 1, 0), weight.reshape(-1, step))
        return jnp.sum(lax.map(part, pieces), axis=0) / (length - 1)

    return constrain(lax.map(micro_batch, (hidden, targets)).reshape(-1))


def perplexity(
    checkpoint: Checkpoint,
    model: Model,
    windows: np.ndarray,
    batch: int | None = None,
    devices: Devices | None = None,
    offload: bool = False,
) -> dict:
    """Perplexity of a checkpoint on windows of token ids.

    Args:
        windows: int32 [N, L].
        batch: windows in a micro-batch; None: `default_batch`.
        devices: what to compute on; None: the default device.
        offload: keep activations in host memory, but for a micro-batch.

    Returns:
        `perplexity`, `nll` (mean over windows, nats), `windows`, `length`, and `tokens` (predicted ones).

    Raises:
        BarberError: windows longer than the model's positions, or a damaged tensor.
    """
    count, length = windows.shape
    if length > model.positions:
        raise BarberError(f"--length {length} is more than the model's {model.positions} positions")
    devices = devices or Devices()
    data = devices.shape[0]
    # Whole micro-batches, which every device has its part of; what fills up the last is not counted.
    size = -(-min(batch or default_batch(length), count) // data) * data
    ids = np.resize(windows, (-(-count // size) * size, length)).reshape(-1, size, length)
    with devices.context():
        hidden = final_hidden(checkpoint, model, ids, devices, offload)
        parameters, head = on_devices(checkpoint, model.names.head, devices), model.head()
        losses, done = [], 0
        for chunk in hidden.take():
            own = devices.put(ids[done : done + len(chunk)], None, DATA)
            losses.append(np.asarray(window_losses(head, parameters, chunk, own), np.float64))
            done += len(chunk)
    nll = float(np.mean(np.concatenate(losses)[:count]))
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "nll": nll,
        "windows": count,
        "length": length,
        "tokens": count * (length - 1),
    }


def evaluate(config: PerplexityConfig) -> list[dict]:
    """Measure what the options ask for, a result for each text. Raises BarberError for the user's mistakes."""
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    check_tensors(checkpoint, model)
    devices = Devices.of(parse_mesh(config.mesh))
    # Windows fill up micro-batches, so any number of them divides.
    devices.check(model.block(), devices.shape[0])
    sources = [(str(path), load_ids(Path(os.path.expanduser(path)))) for path in config.tokens]
    for path in config.text:
        sources.append((str(path), evaluation_ids(checkpoint, path=path, dataset=None, text_field=config.text_field)))
    for name in config.dataset:
        sources.append((name, evaluation_ids(checkpoint, path=None, dataset=name)))
    cut = []
    for source, ids in sources:
        limit = C4_WINDOWS if config.windows is None and source == "c4" else config.windows
        cut.append((source, cut_windows(ids, config.length, limit, source, model.vocabulary)))
    return [
        {
            "ckpt": config.ckpt,
            "source": source,
            **perplexity(checkpoint, model, windows, config.batch, devices, config.offload_activations),
        }
        for source, windows in cut
    ]


def run(arguments: list[str] | None = None) -> None:
    """The command line: prints the perplexity, writes --json."""
    config = parse(PerplexityConfig, "barber_jax.eval.perplexity", arguments)
    set_precision()
    set_compilation_cache(None)
    if config.json is not None and (config.json.is_dir() or not config.json.parent.is_dir()):
        # Before the work, not after it.
        raise BarberError(f"--json {config.json} is a folder or lies in none; name a file in a folder that exists")
    results = evaluate(config)
    for result in results:
        name = f"{result['source']}: " if len(results) > 1 else ""
        print(f"{name}perplexity {result['perplexity']:.4f} ({result['windows']} windows of {result['length']} tokens)")
    if config.json is not None:
        write_results(results, config.json)


def write_results(results: list[dict], path: Path) -> None:
    """One result as it is; of several a list under `results`."""
    content = results[0] if len(results) == 1 else {"ckpt": results[0]["ckpt"], "results": results}
    with writing(path):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[dict]:
    """What `write_results` wrote.

    Raises:
        BarberError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content.get("results", [content])
        if all(isinstance(each["perplexity"], float) and isinstance(each["source"], str) for each in results):
            return results
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BarberError(f"{path}: not what barber_jax.eval.perplexity --json writes; measure again")


if __name__ == "__main__":
    exit_with_one_line(run)
