"""The guard of every tensor that is about to be written: its values must have fitted its dtype."""

import ml_dtypes
import numpy as np

from barber_jax.console.errors import DamagedInput


def require_finite(name: str, tensor: np.ndarray) -> None:
    """Check that a tensor, of any shape and dtype, holds only finite values, so that it can be read again.

    Raises:
        DamagedInput: it holds NaN or Inf.
    """
    if not np.isfinite(tensor).all():
        raise does_not_fit(name, tensor.dtype)


def does_not_fit(name: str, dtype: np.dtype) -> DamagedInput:
    """The error for values that are NaN, or became Inf when they were rounded to `dtype`, that of the source."""
    largest = float(ml_dtypes.finfo(dtype).max)
    wider = "bfloat16 or float32" if np.dtype(dtype) == np.float16 else "float32, or one with smaller weights"
    return DamagedInput(
        f"tensor {name} gets values that do not fit {np.dtype(dtype).name}, its dtype in the checkpoint "
        f"(largest {largest:.6g}); no result is written; give the checkpoint in {wider}"
    )
