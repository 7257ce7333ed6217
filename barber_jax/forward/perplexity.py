"""Perplexity of a checkpoint on windows of token ids, with one decoder block in memory at a time.

The loss of a window of L tokens is the mean cross-entropy of its L-1 next-token predictions, without context from
other windows. Perplexity is exp(mean over windows), as in GPTQ, SparseGPT and Wanda.
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
from barber_jax.data.begin import BeginToken
from barber_jax.devices.mesh import Devices
from barber_jax.forward.dense import final_hidden, read_replicated
from barber_jax.forward.passes import Parameters, default_batch, head_positions
from barber_jax.models.decoder import Definition
from barber_jax.models.family import Model
from barber_jax.models.sharding import DATA, constrain


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(OptionGroup):
    """Evaluation of the dense and the pruned model."""

    eval_text: Path | None = None
    """Measure the perplexity of the dense and the pruned model on this text file."""
    eval_dataset: Literal["wikitext2", "ptb", "c4"] | None = None
    """Measure the perplexity of the dense and the pruned model on this dataset."""
    eval_windows: int | None = None
    """Number of windows of --length tokens to evaluate. Default: all; of c4, 256."""
    begin_token: BeginToken = "auto"
    """Begin token: always = in front of each sample and window of text, auto = as the model needs it."""

    def settle(self) -> None:
        self._require_least(1, "eval_windows")
        if self.eval_text is not None:
            self._set("eval_text", Path(self.eval_text))
        if self.eval_text and self.eval_dataset:
            raise BarberError("--eval-text and --eval-dataset: give one of them")
        if self.eval_windows is not None and not (self.eval_text or self.eval_dataset):
            raise BarberError("--eval-windows needs --eval-text or --eval-dataset")


@partial(jax.jit, static_argnames="definition")
def window_losses(definition: Definition, parameters: Parameters, hidden: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of each window, in nats.

    Args:
        definition, parameters: of the head.
        hidden: [M, B, L, D] hidden states after the last block.
        ids: int32 [M, B, L].

    Returns:
        float32 [M * B].
    """
    head = definition.bind(parameters)
    batch, length = ids.shape[1:]
    step = head_positions(definition, batch, length)
    padding = -length % step
    # Position t predicts token t + 1. The last position and the padding to whole steps have no target.
    targets = jnp.pad(ids[:, :, 1:], ((0, 0), (0, 0), (0, 1 + padding)))
    has_target = jnp.arange(length + padding) < length - 1

    def part(piece: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """Sum of the losses [B] over one step: its hidden states [B, step, D], targets [B, step], mask [step]."""
        states, labels, mask = piece
        logits = head(constrain(states, DATA)).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(jnp.where(mask, loss, 0.0), axis=1)

    def micro_batch(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states = jnp.pad(pair[0], ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, step, pair[0].shape[-1])
        labels = pair[1].reshape(batch, -1, step)
        pieces = (jnp.moveaxis(states, 1, 0), jnp.moveaxis(labels, 1, 0), has_target.reshape(-1, step))
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
        batch: windows in a micro-batch. Default: `default_batch`.
        devices: devices to compute on. Default: the default device.
        offload: keep activations in host memory, with one micro-batch at a time on the device.
        phase: advanced after each block, if given.

    Returns:
        `perplexity`, `nll` (mean over windows, in nats), `windows`, `length`, and `tokens` (number of predictions).

    Raises:
        BarberError: the windows are longer than the model's maximum length, or a tensor is damaged.
    """
    count, length = windows.shape
    model.check_length(length)
    devices = devices or Devices()
    data = devices.shape[0]
    # The micro-batch size must be a multiple of the mesh's `data`; windows that only fill up the last are not counted.
    size = -(-min(batch or default_batch(length), count) // data) * data
    ids = np.resize(windows, (-(-count // size) * size, length)).reshape(-1, size, length)
    with devices.context():
        hidden = final_hidden(checkpoint, model, ids, devices, offload, phase=phase)
        parameters, head = read_replicated(checkpoint, model.names.head, devices), model.head()
        losses, done = [], 0
        for chunk in hidden.take():
            chunk_ids = devices.put(ids[done : done + len(chunk)], None, DATA)
            losses.append(np.asarray(window_losses(head, parameters, chunk, chunk_ids), np.float64))
            done += len(chunk)
    nll = float(np.mean(np.concatenate(losses)[:count]))
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "nll": nll,
        "windows": count,
        "length": length,
        "tokens": count * (length - 1),
    }
