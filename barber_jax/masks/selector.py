"""The choice between the two implementations of `selection`, for one matrix."""

from dataclasses import dataclass

import jax

from barber_jax.masks import selection
from barber_jax.masks.selection import AXES, Selection


@dataclass(frozen=True)
class Selector:
    """Selects weights of a matrix [O, I]. Groups that lie on one device go by `preferred`, others are counted.

    The arguments of its functions are those of the functions of `selection`.

    Attributes:
        preferred: implementation.
        sharded: axes of [O, I] along which the matrix is spread over several devices.
    """

    preferred: Selection = "count"
    sharded: tuple[int, ...] = ()

    def implementation(self, axes: tuple[int, ...]) -> Selection:
        """What selects in groups that span the axes."""
        return "count" if set(axes) & set(self.sharded) else self.preferred

    def keep_highest(self, scores: jax.Array, prune: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Mask bool [O, I] that prunes the lowest scores of every group."""
        return selection.keep_highest(scores, prune, axes, self.implementation(axes))

    def keep_n_of_m(self, scores: jax.Array, keep: int, of: int) -> jax.Array:
        """Mask bool [O, I] that keeps the N highest scores of every M inputs."""
        return selection.keep_n_of_m(scores, keep, of, self.implementation(AXES["output1"]))

    def swap(self, metric: jax.Array, mask: jax.Array, alpha: jax.Array, granularity: str) -> jax.Array:
        """The new mask of one matrix whose groups do not span other matrices."""
        how = self.implementation(AXES[granularity])
        return selection.swap([metric], [mask], alpha, granularity, how)[0]

    def swap_n_of_m(self, metric: jax.Array, mask: jax.Array, alpha: jax.Array, keep: int, of: int) -> jax.Array:
        """The new N:M mask of one matrix."""
        return selection.swap_n_of_m(metric, mask, alpha, keep, of, self.implementation(AXES["output1"]))
