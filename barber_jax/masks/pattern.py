"""Sparsity patterns: which weights a mask may prune, and how many."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup


@dataclass(frozen=True)
class SparsityPattern:
    """Unstructured sparsity, or N:M: `keep` weights kept in each group of `of` consecutive inputs of an output.

    Attributes:
        sparsity: fraction of weights pruned, in [0, 1).
        keep, of: N and M of an N:M pattern; 0 for unstructured.
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, pattern: str, sparsity: float | None) -> "SparsityPattern":
        """Build a pattern from the options `--pattern` and `--sparsity` (None: not given).

        Raises:
            BarberError: an unknown pattern, N > M, a sparsity outside [0, 1) or in conflict with N:M.
        """
        if sparsity is not None and not 0 <= sparsity < 1:  # NaN fails this too
            raise BarberError(f"--sparsity {sparsity:g} is outside [0, 1)")
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", pattern)
        if not found:
            raise BarberError(f"--pattern {pattern!r} is neither 'unstructured' nor N:M such as 2:4")
        keep, of = int(found[1]), int(found[2])
        if not 1 <= keep <= of:
            raise BarberError(f"--pattern {pattern}: keeping N of every M inputs needs 1 <= N <= M")
        implied = 1 - keep / of
        if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-6):
            raise BarberError(f"--sparsity {sparsity:g} conflicts with --pattern {pattern}, which means {implied:g}")
        return cls(implied, keep, of)

    @property
    def structured(self) -> bool:
        """Whether the pattern is N:M."""
        return self.of > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.structured else "unstructured"

    def check_inputs(self, inputs: int, name: str) -> None:
        """Raise BarberError unless M divides the number of inputs of the linear `name`."""
        if self.structured and inputs % self.of:
            raise BarberError(f"--pattern {self}: {self.of} does not divide the {inputs} inputs of {name}")


def pattern_of(masks: Collection[np.ndarray]) -> tuple[str, float]:
    """The pattern that masks have, "unstructured" or N:M, and the fraction of weights that they prune.

    N:M is the one of the shortest groups, of 2 to 32 inputs, that every mask has. Masks are bool [out, in].
    """
    pruned = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)
    for of in (2, 4, 8, 16, 32) if pruned else ():
        keep = round((1 - pruned) * of)
        if all(mask.shape[1] % of == 0 and (mask.reshape(-1, of).sum(axis=1) == keep).all() for mask in masks):
            return f"{keep}:{of}", pruned
    return "unstructured", pruned


@dataclass(frozen=True, kw_only=True)
class PatternOptions(OptionGroup):
    """Sparsity and its pattern."""

    sparsity: float | None = None
    """Fraction of weights to prune, in [0, 1). Default: 0.5, or the fraction that N:M implies."""
    pattern: str | None = None
    """unstructured, or N:M to keep N of every M consecutive inputs. Default: that of --masks, else unstructured."""

    def settle(self) -> None:
        _ = self.sparsity_pattern

    @property
    def sparsity_pattern(self) -> SparsityPattern:
        """The pattern defined by --pattern and --sparsity."""
        return SparsityPattern.parse("unstructured" if self.pattern is None else self.pattern, self.sparsity)
