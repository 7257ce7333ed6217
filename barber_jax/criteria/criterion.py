"""What the stream needs to know of a starting criterion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from barber_jax.config import SparsityPattern


@dataclass(frozen=True)
class Criterion:
    """A starting criterion.

    Attributes:
        statistic: activations [S, L, I] that enter a linear -> what the criterion needs of them, float32, summed over
            samples (the stream adds up micro-batches). None when it looks at weights alone; then no stream A is
            carried.
        start: (kernel float32 [I, O], prepared statistic or None, number of samples, pattern) -> bool [O, I] mask,
            True = kept, and the updated kernel float32 [I, O], or None where the criterion leaves weights alone.
            Traced; number of samples and pattern are static.
        prepare: what is done once for all linears that read the same input, on the host: (statistic, number of
            samples, input's name, say) -> prepared statistic. None: the statistic as it is. `say` prints a line.
    """

    statistic: Callable[[jax.Array], jax.Array] | None
    start: Callable[[jax.Array, Any, int, SparsityPattern], tuple[jax.Array, jax.Array | None]]
    prepare: Callable[[jax.Array, int, str, Callable[[str], None]], Any] | None = None
