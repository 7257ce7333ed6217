"""Perplexity of a checkpoint on windows of token ids, one block in memory at a time.

Each window is scored by itself: the mean cross-entropy of its L-1 next-token predictions. Perplexity is exp(mean over
windows), as in GPTQ, SparseGPT and Wanda.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup
from barber_jax.console.progress import Phase
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.devices.mesh import Devices
from barber_jax.forward.dense import final_hidden, on_devices
from barber_jax.forward.passes import Parameters, default_batch
from barber_jax.models.decoder import Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, constrain

HEAD_TOKENS = 256
"""The loss is taken over this many tokens at a time, so that logits over a large vocabulary stay small."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(OptionGroup):
    """Perplexity of the dense model and of the result."""

    eval_text: Path | None = None
    """Measure perplexity of the dense model and of the result on this text file."""
    eval_dataset: Literal["wikitext2", "ptb", "c4"] | None = None
    """Measure perplexity of the dense model and of the result on this dataset."""
    eval_windows: int | None = None
    """Windows of --length tokens to measure on. Default: all."""

    def settle(self) -> None:
        self._require_least(1, "eval_windows")
        if self.eval_text and self.eval_dataset:
            raise BarberError("--eval-text and --eval-dataset: give one of them")
        if self.eval_windows is not None and not (self.eval_text or self.eval_dataset):
            raise BarberError("--eval-windows needs --eval-text or --eval-dataset")


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
    phase: Phase | None = None,
) -> dict:
    """Perplexity of a checkpoint on windows of token ids.

    Args:
        windows: int32 [N, L].
        batch: windows in a micro-batch; None: `default_batch`.
        devices: what to compute on; None: the default device.
        offload: keep activations in host memory, but for a micro-batch.
        phase: told of every block, if given.

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
        hidden = final_hidden(checkpoint, model, ids, devices, offload, phase=phase)
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
