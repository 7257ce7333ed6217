"""Recovery: trains the surviving weights of a whole pruned model while its pruned weights stay zero.

May import: console, masks, models, data, convert, devices, forward, criteria, run.

| module | holds |
|---|---|
| `options`, `recover_config` | the options of `python -m barber_jax.recover` |
| `program` | a whole model as one flat dict of parameters, sharded over all devices, and its pass |
| `lora` | low-rank updates under a mask |
| `objective` | the loss, chunk by chunk over the vocabulary, and its gradient |
| `training` | one optimizer step; losses on held-out text |
| `inputs` | all that a recovery needs, opened and checked |
| `self_text` | text that the teacher writes |
| `source` | the masks and weights that a recovery starts from |
| `checkpoints` | what survives a crash: weights, moments, position in the text |
| `loop` | the loop over steps |
| `result` | writes the recovered checkpoint |
| `cost` | operations and memory of a step, as arithmetic |
"""
