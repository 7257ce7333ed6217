"""Criteria: starting masks, by a pruning criterion or given, and the allocation of sparsity to blocks.

May import: console, masks, models, data, convert, devices, forward.

| module | what it holds |
|---|---|
| `base` | the criterion protocol |
| `magnitude`, `wanda`, `sparsegpt`, `alps`, `gblm` | one criterion each |
| `starting` | starting masks of each block: by a criterion, from a mask file, or from a pruned checkpoint |
| `allocation` | sparsity of each block: uniform, OWL, or rising from block to block |
| `owl` | OWL: lower sparsity for blocks with more outliers |
"""

from barber_jax.criteria import alps, gblm, magnitude, sparsegpt, wanda
from barber_jax.criteria.base import Criterion

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude.CRITERION,
    "wanda": wanda.CRITERION,
    "sparsegpt": sparsegpt.CRITERION,
    "alps": alps.CRITERION,
    "gblm": gblm.CRITERION,
}

__all__ = ["CRITERIA", "Criterion"]
