"""Forward: activations through a model, one decoder block in memory at a time.

May import: console, masks, models, data, convert, devices.

| module | what it holds |
|---|---|
| `passes` | jitted passes through embeddings, a block, the head |
| `streams` | hidden states of all samples, on the device or in host memory |
| `dense` | forward of a whole checkpoint, block by block |
| `perplexity` | perplexity of a checkpoint |
| `resident` | a whole model in memory: scores of sequences, generation |
"""

from barber_jax.forward.perplexity import perplexity
from barber_jax.forward.streams import Stream, Streams

__all__ = ["Stream", "Streams", "perplexity"]
