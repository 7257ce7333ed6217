"""Run: the pruning loop, and what lets it survive a crash.

May import: console, masks, models, data, convert, devices, forward, criteria, stages.

| module | what it holds |
|---|---|
| `loop` | the one loop over decoder blocks |
| `resume` | which run a command is; starting or resuming an unfinished run |
| `run_state` | finished blocks of an unfinished run, on disk |
| `history` | the same, for every process |
| `block_file`, `fingerprint` | one block's file with its checksum; hashes of content |
"""

from barber_jax.run.history import History
from barber_jax.run.loop import BlockResult, Pruning
from barber_jax.run.run_state import RunState

__all__ = ["BlockResult", "History", "Pruning", "RunState"]
