"""A stream: the hidden state of every calibration sample, on the device or in host memory."""

from collections.abc import Iterable, Iterator

import jax


class Stream:
    """Hidden states [M, B, L, D], M micro-batches of B samples, as chunks of micro-batches.

    On the device one chunk holds all. Offloaded, each micro-batch is a chunk of its own in (pinned) host memory and
    is on the device only while it is worked on, so that the device needs room for a micro-batch and not for a stream.

    Args:
        chunks: arrays on the device, [m, B, L, D] each; taken one at a time.
        offload: keep them in host memory.
    """

    def __init__(self, chunks: Iterable[jax.Array], offload: bool):
        self._offload = offload
        self._chunks: list[jax.Array] = []
        for chunk in chunks:
            self._chunks.append(self._keep(chunk))

    def _keep(self, chunk: jax.Array) -> jax.Array:
        if not self._offload:
            return chunk
        # Waited for: what is dispatched ahead holds its device memory already.
        return jax.block_until_ready(jax.device_put(chunk, chunk.sharding.with_memory_kind("pinned_host")))

    def __iter__(self) -> Iterator[jax.Array]:
        """The chunks, on the device."""
        for chunk in self._chunks:
            yield self._bring(chunk)

    def take(self) -> Iterator[jax.Array]:
        """The chunks, on the device, each given up: what takes one may overwrite it."""
        while self._chunks:
            yield self._bring(self._chunks.pop(0))

    def _bring(self, chunk: jax.Array) -> jax.Array:
        if not self._offload:
            return chunk
        return jax.device_put(chunk, chunk.sharding.with_memory_kind("device"))

    def ready(self) -> "Stream":
        """Wait until every chunk is computed."""
        jax.block_until_ready(self._chunks)
        return self
