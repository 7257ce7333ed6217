"""Where masks prune outliers of the score: the maps of figure 1b of the paper, and their form in run.json."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from barber_jax.masks import selection
from barber_jax.models.decoder import SubBlock
from barber_jax.models.sharding import constrain

OUTLIERS, BINS = 100, 16
"""One weight in OUTLIERS is an outlier; outliers are counted in BINS x BINS tiles of a matrix."""


@partial(jax.jit, static_argnames="sub")
def outlier_maps(
    sub: SubBlock, scores: dict[str, jax.Array], before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Count the pruned outliers, the highest 1 % of a matrix's scores, in each tile of the matrix.

    Args:
        scores: kernel path -> float32 [out, in].
        before, after: kernel path -> bool [out, in], masks before and after the rebuild.

    Returns:
        kernel path -> int32 [2, BINS, BINS], outliers pruned by either mask in each tile, outputs by inputs.
    """

    def maps(path: str) -> jax.Array:
        score = scores[path]
        high = selection.keep_highest(score, score.size - score.size // OUTLIERS, selection.AXES["layer"])
        sides = [jnp.arange(size) * BINS // size for size in score.shape]
        outputs, inputs = (jnp.arange(BINS)[:, None] == side for side in sides)

        def count(flags: jax.Array) -> jax.Array:
            # Products of zeros and ones: exact in float32 as no tile holds 2^24 outliers, but not in fewer bits.
            with jax.default_matmul_precision("highest"):
                return outputs.astype(jnp.float32) @ flags.astype(jnp.float32) @ inputs.T

        return constrain(jnp.stack([count(high & ~mask[path]) for mask in (before, after)]).astype(jnp.int32))

    return {path: maps(path) for path in sub.kernels}


def format_maps(maps: np.ndarray) -> dict[str, str]:
    """Maps int [2, BINS, BINS] of a matrix as text for run.json: counts of a row of tiles by spaces, rows by `;`."""
    rows = [";".join(" ".join(map(str, row)) for row in each.tolist()) for each in maps]
    return dict(zip(("before", "after"), rows, strict=True))


def parse_map(text: str) -> np.ndarray:
    """One map of `format_maps` as int [BINS, BINS]."""
    return np.array([[int(count) for count in row.split()] for row in text.split(";")])
