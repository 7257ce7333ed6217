"""Activation streams: the hidden states of all calibration samples, kept on the device or in host memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax


class Stream:
    """Hidden states [M, B, L, D] of M micro-batches of B samples, split along M into chunks.

    On the device there are one or two chunks: the training samples and, where there are any, the held-out ones.
    Offloaded, each micro-batch is a chunk in pinned host memory and is copied to the device only for its computation,
    so that the device holds one micro-batch at a time.

    Args:
        chunks: arrays [m, B, L, D] on the device, consumed one at a time.
        offload: keep the chunks in host memory.

    Attributes:
        offloaded: whether the chunks are kept in host memory.
    """

    def __init__(self, chunks: Iterable[jax.Array], offload: bool):
        self.offloaded = offload
        self._chunks: list[jax.Array] = []
        for chunk in chunks:
            self._chunks.append(self._store(chunk))

    def _store(self, chunk: jax.Array) -> jax.Array:
        if not self.offloaded:
            return chunk
        # Wait for the copy: the next chunk's computation would be dispatched ahead and allocate its device memory.
        return jax.block_until_ready(jax.device_put(chunk, chunk.sharding.with_memory_kind("pinned_host")))

    def __iter__(self) -> Iterator[jax.Array]:
        """Yield the chunks, copied to the device."""
        for chunk in self._chunks:
            yield self._to_device(chunk)

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self._chunks)

    @classmethod
    def joined(cls, streams: Iterable["Stream"]) -> "Stream":
        """Concatenate streams without copying their chunks; all must be offloaded, or none."""
        streams = list(streams)
        joined = cls((), streams[0].offloaded)
        joined._chunks = [chunk for stream in streams for chunk in stream._chunks]
        return joined

    @property
    def micro_batch(self) -> int:
        """Samples in a micro-batch, B."""
        return self._chunks[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def at(self, index: int) -> jax.Array:
        """Return one chunk, copied to the device."""
        return self._to_device(self._chunks[index])

    def part(self, chosen: slice) -> "Stream":
        """Return a stream of the chosen chunks without copying them."""
        part = Stream((), self.offloaded)
        part._chunks = self._chunks[chosen]
        return part

    def take(self) -> Iterator[jax.Array]:
        """Yield the chunks, copied to the device, and remove each from the stream so that the caller may donate it."""
        while self._chunks:
            yield self._to_device(self._chunks.pop(0))

    def _to_device(self, chunk: jax.Array) -> jax.Array:
        if not self.offloaded:
            return chunk
        return jax.device_put(chunk, chunk.sharding.with_memory_kind("device"))

    def ready(self) -> "Stream":
        """Wait until every chunk is computed, and return the stream."""
        jax.block_until_ready(self._chunks)
        return self


@dataclass
class Streams:
    """The activation streams of a pruning run, each at the current block or sub-block.

    Attributes:
        start: stream A, of the model under its starting masks.
        rebuilt: stream B, of the model as pruned and rebuilt so far.
        dense: stream of the dense model.
        held_out: number of chunks at the end of each stream that hold the held-out samples.

    A stream is None where the run does not need it.
    """

    start: Stream | None = None
    rebuilt: Stream | None = None
    dense: Stream | None = None
    held_out: int = 0

    @property
    def training(self) -> slice:
        """The chunks of training samples, from which stages learn."""
        return slice(None, -self.held_out or None)

    @property
    def validation(self) -> slice:
        """The chunks of held-out samples."""
        return slice(-self.held_out, None) if self.held_out else slice(0, 0)
