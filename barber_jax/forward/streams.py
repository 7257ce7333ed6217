"""Activation streams: the hidden state of every calibration sample, on the device or in host memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax


class Stream:
    """Hidden states [M, B, L, D] of M micro-batches of B samples, in chunks of micro-batches.

    On the device one chunk holds all. Offloaded, each micro-batch is a chunk of its own in (pinned) host memory and
    is on the device only while it is worked on, so that the device needs room for one micro-batch.

    Args:
        chunks: arrays on the device, [m, B, L, D] each; taken one at a time.
        offload: keep them in host memory.

    Attributes:
        offloaded: the same.
    """

    def __init__(self, chunks: Iterable[jax.Array], offload: bool):
        self.offloaded = offload
        self._chunks: list[jax.Array] = []
        for chunk in chunks:
            self._chunks.append(self._keep(chunk))

    def _keep(self, chunk: jax.Array) -> jax.Array:
        if not self.offloaded:
            return chunk
        # Waited for: what is dispatched ahead holds its device memory already.
        return jax.block_until_ready(jax.device_put(chunk, chunk.sharding.with_memory_kind("pinned_host")))

    def __iter__(self) -> Iterator[jax.Array]:
        """The chunks, on the device."""
        for chunk in self._chunks:
            yield self._bring(chunk)

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    @classmethod
    def joined(cls, streams: Iterable["Stream"]) -> "Stream":
        """One stream of the chunks of several, sharing their memory; all must be kept in the same place."""
        streams = list(streams)
        joined = cls((), streams[0].offloaded)
        joined._chunks = [chunk for stream in streams for chunk in stream._chunks]
        return joined

    @property
    def micro_batch(self) -> int:
        """B."""
        return self._chunks[0].shape[1]

    def at(self, index: int) -> jax.Array:
        """One chunk, on the device."""
        return self._bring(self._chunks[index])

    def part(self, chosen: slice) -> "Stream":
        """A stream of some of the chunks, sharing their memory."""
        part = Stream((), self.offloaded)
        part._chunks = self._chunks[chosen]
        return part

    def take(self) -> Iterator[jax.Array]:
        """The chunks, on the device, each removed from the stream: the caller may donate it."""
        while self._chunks:
            yield self._bring(self._chunks.pop(0))

    def _bring(self, chunk: jax.Array) -> jax.Array:
        if not self.offloaded:
            return chunk
        return jax.device_put(chunk, chunk.sharding.with_memory_kind("device"))

    def ready(self) -> "Stream":
        """Wait until every chunk is computed."""
        jax.block_until_ready(self._chunks)
        return self


@dataclass
class Streams:
    """The activations that go through the model.

    Attributes:
        start: stream A, of the model under its starting masks.
        rebuilt: stream B, of the model as pruned and rebuilt so far.
        dense: of the dense model.
        held_out: how many chunks at the end of each hold the held-out samples.

    A stream is None where the run does not need it.
    """

    start: Stream | None = None
    rebuilt: Stream | None = None
    dense: Stream | None = None
    held_out: int = 0

    @property
    def training(self) -> slice:
        """The chunks that stages learn from."""
        return slice(None, -self.held_out or None)

    @property
    def validation(self) -> slice:
        """The chunks of held-out samples."""
        return slice(-self.held_out, None) if self.held_out else slice(0, 0)
