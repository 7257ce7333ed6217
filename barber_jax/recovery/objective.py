"""The loss of a recovery, and its gradient with logits of a chunk of tokens in memory at a time.

loss = (1 - mix) KL(dense || sparse) + mix cross-entropy, means over the tokens that have a next token. The gradient
with respect to the hidden states after the last block is computed chunk by chunk together with the loss, so that no
logits are kept or computed twice; it is then taken back through the blocks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from barber_jax.forward.passes import HEAD_TOKENS, Parameters
from barber_jax.models.sharding import constrain
from barber_jax.recovery.program import ALL, Program

Metrics = dict[str, jax.Array]
"""`loss`, `kl` (0 without a teacher) and `cross_entropy` in nats, float32 scalars."""


@dataclass(frozen=True)
class Objective:
    """What is computed from a batch; hashable.

    Attributes:
        program: of the sparse model and of its teacher.
        mix: share of the cross-entropy in the loss; 1 without a teacher.
        devices: number of devices over which samples are sharded.
    """

    program: Program
    mix: float
    devices: int = 1

    def gradient(
        self, values: Parameters, frozen: Parameters, masks: Parameters, teacher: Parameters, ids: jax.Array
    ) -> tuple[Parameters, Metrics]:
        """Gradient of the loss of a micro-batch with respect to `values`, and the loss.

        Args:
            values: float32 parameters that are trained.
            frozen: the other parameters of the model.
            masks: as for `Program.hidden_states`.
            teacher: parameters of the dense model; {} for none.
            ids: int32 [B, L].
        """
        program = self.program
        hidden, pull = jax.vjp(lambda values: program.hidden_states({**frozen, **values}, masks, ids), values)
        trained = {name: values[name] for name in program.head_names(values)}
        others = {name: frozen[name] for name in program.head_names(frozen)}
        metrics, hidden_gradient, head_gradient = self._head(trained, others, hidden, teacher, ids, differentiate=True)
        (gradient,) = pull(hidden_gradient)
        return {**gradient, **{name: gradient[name] + g for name, g in head_gradient.items()}}, metrics

    def losses(self, parameters: Parameters, masks: Parameters, teacher: Parameters, ids: jax.Array) -> Metrics:
        """The loss of a micro-batch, int32 [B, L] ids, without its gradient."""
        hidden = self.program.hidden_states(parameters, masks, ids)
        own = {name: parameters[name] for name in self.program.head_names(parameters)}
        return self._head({}, own, hidden, teacher, ids, differentiate=False)[0]

    def _head(
        self,
        trained: Parameters,
        others: Parameters,
        hidden: jax.Array,
        teacher: Parameters,
        ids: jax.Array,
        differentiate: bool,
    ) -> tuple[Metrics, jax.Array, Parameters]:
        """Loss from the hidden states [B, L, D], and its gradients with respect to them and to `trained`."""
        program, (batch, length) = self.program, ids.shape
        # Whole on every device once, and not again for every chunk.
        trained_whole, others, of_teacher = (
            {name: constrain(value) for name, value in given.items()}
            for given in (trained, others, {name: teacher[name] for name in program.head_names(teacher)})
        )
        target = lax.stop_gradient(program.hidden_states(teacher, {}, ids)) if teacher else hidden
        step = max(1, min(HEAD_TOKENS * self.devices // batch, length))
        padding = -length % step

        def chunks(value: jax.Array) -> jax.Array:
            """[B, L, ...] -> [chunks, B, step, ...]"""
            padded = jnp.pad(value, ((0, 0), (0, padding), *((0, 0),) * (value.ndim - 2)))
            return jnp.moveaxis(padded.reshape(batch, -1, step, *value.shape[2:]), 1, 0)

        # Position t predicts token t + 1: the last position and the padding have no target.
        labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        has_target = (jnp.arange(length + padding) < length - 1).reshape(-1, step)
        count = batch * (length - 1)

        def mean(values: jax.Array, mask: jax.Array) -> jax.Array:
            """Contribution of a chunk [B, step] to the mean over all tokens that have a target."""
            return jnp.sum(jnp.where(mask, values, 0.0)) / count

        def loss(trained: Parameters, states: jax.Array, wanted: jax.Array, labels: jax.Array, mask: jax.Array):
            logits = program.logits({**others, **trained}, constrain(states, ALL))
            log_probabilities = jax.nn.log_softmax(logits)
            # Not by an index: its gradient would be a scatter, which is slow where it must be repeatable.
            chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
            entropy = mean(-jnp.sum(jnp.where(chosen, log_probabilities, 0.0), axis=-1), mask)
            divergence = jnp.zeros((), jnp.float32)
            if teacher:
                dense = jax.nn.log_softmax(program.logits(of_teacher, constrain(wanted, ALL)))
                divergence = mean(jnp.sum(jnp.exp(dense) * (dense - log_probabilities), axis=-1), mask)
            # What has no share in the loss is not differentiated either.
            parts = [(1 - self.mix, divergence), (self.mix, entropy)]
            total = sum(share * value for share, value in parts if share)
            return total, {"loss": total, "kl": divergence, "cross_entropy": entropy}

        zero = {name: jnp.zeros((), jnp.float32) for name in ("loss", "kl", "cross_entropy")}
        pieces = (chunks(hidden), chunks(target), chunks(labels), has_target)
        if not differentiate:
            metrics, _ = lax.scan(
                lambda total, piece: (jax.tree.map(jnp.add, total, loss({}, *piece)[1]), None), zero, pieces
            )
            return metrics, hidden, {}

        def chunk(carry: tuple[Metrics, Parameters], piece: tuple) -> tuple[tuple[Metrics, Parameters], jax.Array]:
            metrics, gradient = carry
            (_, more), (of_trained, of_states) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
                trained_whole, *piece
            )
            return jax.tree.map(jnp.add, (metrics, gradient), (more, of_trained)), of_states

        start = (zero, jax.tree.map(jnp.zeros_like, trained_whole))
        (metrics, gradient), of_states = lax.scan(chunk, start, pieces)
        of_hidden = jnp.moveaxis(of_states, 0, 1).reshape(batch, length + padding, -1)[:, :length]
        return metrics, constrain(of_hidden, ALL), gradient
