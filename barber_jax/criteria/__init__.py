"""Criteria: which weights are pruned before the first stage, and how sparsity is allocated to blocks.

May import: console, masks, models, data, convert, devices, forward.

| module | what it holds |
|---|---|
| `base` | the criterion protocol |
| `magnitude`, `wanda`, `sparsegpt` | one criterion each |
| `starting` | starting masks of block after block: by a criterion, from a mask file, from a pruned checkpoint |
| `allocation` | OWL: less sparsity for blocks with more outliers |
"""

from barber_jax.criteria import magnitude, sparsegpt, wanda
from barber_jax.criteria.base import Criterion

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude.CRITERION,
    "wanda": wanda.CRITERION,
    "sparsegpt": sparsegpt.CRITERION,
}

__all__ = ["CRITERIA", "Criterion"]
