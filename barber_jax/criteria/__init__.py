"""Starting criteria: which weights to prune before the mask is rebuilt.

A criterion is one file here that defines `CRITERION`, and one line of `CRITERIA`.
"""

from barber_jax.criteria import magnitude, sparsegpt, wanda
from barber_jax.criteria.base import Criterion

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude.CRITERION,
    "sparsegpt": sparsegpt.CRITERION,
    "wanda": wanda.CRITERION,
}
