"""Numbers of config.json that enter float32 computations."""

import sys

import numpy as np

from barber_jax.console.errors import BarberError

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Range of float32 without subnormals, which XLA may replace by 0."""


def positive(what: str, value, most: float = LARGEST) -> float:
    """`value`, an entry of config.json called `what`, as a float above 0 that float32 can hold.

    Raises:
        BarberError: it is not a finite number above 0, or is outside float32 or above `most`.
    """
    # Compared before the conversion to float, which a huge integer would overflow; NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
        raise BarberError(f"config.json: {what} must be a finite number above 0, not {value!r}")
    if not SMALLEST <= value <= most:
        raise BarberError(
            f"config.json: {what} {float(value):g} would make activations constant or not finite; it must be from "
            f"{SMALLEST:.3g} to {most:.3g}; correct config.json or fetch it again"
        )
    return float(value)
