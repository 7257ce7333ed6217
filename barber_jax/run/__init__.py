"""Run: the pruning loop over decoder blocks, and resuming an interrupted run.

May import: console, masks, models, data, convert, devices, forward, criteria, stages.

| module | what it holds |
|---|---|
| `loop` | the loop over decoder blocks |
| `calibration` | calibration samples: from text, or written by the model and kept for a resumed run |
| `resume` | identity of a run; starting or resuming an unfinished run |
| `run_state` | finished blocks of an unfinished run, on disk |
| `identity` | what identifies an unfinished run |
| `dense_gradients`, `gradient_file` | gradients of the dense model, from a backward sweep; their file |
| `history` | access to the finished blocks from every process |
| `block_file`, `fingerprint` | a block's file with its checksum; content hashes |
"""

from barber_jax.run.history import History
from barber_jax.run.loop import BlockResult, Pruning
from barber_jax.run.run_state import RunState

__all__ = ["BlockResult", "History", "Pruning", "RunState"]
