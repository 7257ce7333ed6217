"""Forward: passes through a model, forward and backward, with one decoder block in memory at a time, and perplexity.

May import: console, masks, models, data, convert, devices.

| module | what it holds |
|---|---|
| `passes` | jitted passes through the embeddings, a block and the head |
| `streams` | hidden states of all samples, on the device or in host memory |
| `dense` | forward pass through a whole checkpoint, block by block |
| `sweep`, `cotangents` | backward sweep of the end loss through a whole checkpoint, block by block; its jitted parts |
| `evaluation` | perplexity as a step of other commands |
| `perplexity` | perplexity of a checkpoint |
| `generation` | tokens one after the other, greedily or sampled, with a key-value cache |
| `self_calibration` | calibration samples that the dense model writes itself |
| `resident` | a whole model in device memory: log-likelihoods and generation |
"""

from barber_jax.forward.streams import Stream, Streams

__all__ = ["Stream", "Streams"]
