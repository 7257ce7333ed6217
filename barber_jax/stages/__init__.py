"""Stages: what is done to a sub-block after its starting mask.

May import: console, masks, models, data, convert, devices, forward, criteria.

| module | what it holds |
|---|---|
| `base` | the stage protocol, and the sub-block that stages hand on |
| `table` | `STAGES`, the stages in the order in which they run |
| `sub_block` | one sub-block through all its stages |
| `rebuild`, `gradients`, `outliers` | LLM-Barber: score, swaps; gradient importance; where outliers are pruned |
| `refine`, `exact_swaps`, `layerwise` | better masks: the stage; swaps by exact gain; Gram matrices |
| `least_squares` | better weights, quickly: the stage; conjugate gradients on Gram matrices |
| `reconstruct`, `training` | better weights: the stage; Adam on the surviving weights |
| `loss`, `targets`, `weights` | reconstruction loss; target of a sub-block; masks and weights between stages |
"""

from barber_jax.stages.base import SharedOptions, Stage, Work
from barber_jax.stages.sub_block import SubBlockStages, held_out_samples
from barber_jax.stages.table import STAGES, unused_options, validates

__all__ = [
    "STAGES",
    "SharedOptions",
    "Stage",
    "SubBlockStages",
    "Work",
    "held_out_samples",
    "unused_options",
    "validates",
]
