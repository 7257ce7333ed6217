"""GBLM-Pruner: Wanda's score plus |weight| times the norm of its gradient (Das et al., arXiv 2311.04902).

With g_s the gradient of the dense model's mean next-token cross-entropy on sample s:

    score = |W| * ||X||_2 + beta * |W| * ||g||_p

where ||g||_p is over samples: the sum of |g_s| for l1, the root of the sum of g_s^2 for l2. The gradients come from one
backward sweep through the dense model before the first block is pruned (`forward.sweep`).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.criteria import wanda
from barber_jax.criteria.base import Criterion, Quota
from barber_jax.forward.cotangents import Norm
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.masks.selection import AXES
from barber_jax.masks.selector import Selector
from barber_jax.models.numbers import LARGEST

BETA, NORM = 100.0, "l1"
"""Defaults: the paper's scale of the gradients (there called alpha), and the first of its two norms."""


@dataclass(frozen=True, kw_only=True)
class GblmOptions(OptionGroup):
    """GBLM-Pruner's score."""

    gblm_beta: float | None = None
    """With gblm: weight of the gradients in the score. Default 100, as published."""
    gblm_norm: Norm | None = None
    """With gblm: norm of a weight's gradients over samples. Default l1."""

    def settle(self) -> None:
        for option, default in {"gblm_beta": BETA, "gblm_norm": NORM}.items():
            value = getattr(self, option)
            if self.method != "gblm" and value is not None:
                raise BarberError(f"{flag(option)} {value} needs --method gblm")
            if self.method == "gblm" and value is None:
                self._set(option, default)
        if self.method == "gblm" and not 0 <= self.gblm_beta <= LARGEST:  # NaN fails this too
            raise BarberError(f"--gblm-beta {self.gblm_beta:g} must be a finite number of at least 0, within float32")


@dataclass(frozen=True)
class Start:
    """`Criterion.start`.

    Attributes:
        beta: weight of the gradients.
        norm: of the gradients, over samples.
    """

    beta: float
    norm: Norm

    def __call__(
        self,
        kernel: jax.Array,
        statistics: tuple[jax.Array, jax.Array],
        samples: int,
        pattern: SparsityPattern,
        quota: Quota,
        select: Selector,
    ) -> tuple[jax.Array, None]:
        """Prune the weights with the lowest score, in each output or in every M inputs, as Wanda does.

        Args:
            kernel: float32 [I, O].
            statistics: squares float32 [I], `wanda.statistic` summed over all samples; and float32 [I, O], mean over
                samples of |g_s|, or root of the mean of g_s^2.
            samples: number of samples.
            quota: one number, from `quota_per_output`.
            select: of the matrix.

        Returns:
            bool [O, I] mask, True = kept; no updated weights.
        """
        squares, gradient = statistics
        # The paper's norm is a sum over samples.
        scale = self.beta * (samples if self.norm == "l1" else samples**0.5)
        score = jnp.abs(kernel.T) * (jnp.sqrt(squares / samples) + scale * gradient.T)
        if pattern.structured:
            return select.keep_n_of_m(score, pattern.keep, pattern.of), None
        return select.keep_highest(score, quota[0], AXES["output1"]), None


def configure(criterion: Criterion, options: Any) -> Criterion:
    """The criterion with the options `gblm_beta` and `gblm_norm`."""
    start = Start(options.gblm_beta, options.gblm_norm)
    return replace(criterion, start=start, gradients=options.gblm_norm)


CRITERION = Criterion(statistic=wanda.statistic, start=Start(BETA, NORM), gradients=NORM, configure=configure)
