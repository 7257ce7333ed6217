"""Base test of starting criteria: exact sparsity, N:M, every family, both dtypes, a mesh, resuming, determinism."""

import json

import numpy as np
from base_contract import Contract, zeros_are_the_masks

from barber_jax.criteria import CRITERIA


class CriterionContract(Contract):
    """Inherit, and set `method` and `options = ("--method", method, "--no-rebuild")`.

    Attributes:
        method: name in `CRITERIA`.
        group: axes of a matrix [out, in] that one comparison group spans: (1,) for an output, (0, 1) for the matrix.
    """

    method: str
    group: tuple[int, ...] = (1,)

    def check(self, out, masks, start):
        for name, mask in masks.items():
            np.testing.assert_array_equal(start[name], mask)
            pruned = np.sum(~mask, axis=self.group)
            assert (pruned == self.quota(mask.shape)).all(), name
        assert zeros_are_the_masks(out, masks)
        record = json.loads((out / "run.json").read_text())
        assert record["totals"]["pruned"] == sum(int((~mask).sum()) for mask in masks.values())

    def quota(self, shape):
        """Weights that each comparison group of a matrix [out, in] loses at 50 %."""
        return CRITERIA[self.method].quota(shape, 0.5)[0]
