"""Agreement of the masks of several runs: the Jaccard index |A and B| / |A or B| of their pruned and swapped weights.

Counts are taken on packed bits (eight weights per byte), one matrix at a time, so no mask is ever unpacked.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.eval.runs import Run
from barber_jax.masks.mask_file import read_masks


@dataclass
class Overlap:
    """Overlap of two sets of weights.

    Attributes:
        intersection, union: matrix name -> number of weights in both sets, and in at least one of them.
    """

    intersection: dict[str, int]
    union: dict[str, int]

    @property
    def per_matrix(self) -> dict[str, float]:
        """Jaccard index of each matrix; 1 where both sets are empty."""
        return {name: _jaccard(self.intersection[name], self.union[name]) for name in self.intersection}

    @property
    def overall(self) -> float:
        """Jaccard index over all matrices together."""
        return _jaccard(sum(self.intersection.values()), sum(self.union.values()))

    def summary(self) -> dict:
        """The indices as study.json holds them."""
        per_matrix = self.per_matrix
        return {"jaccard": self.overall, "lowest_matrix": min(per_matrix.values()), "matrices": per_matrix}


def _jaccard(intersection: int, union: int) -> float:
    return intersection / union if union else 1.0


def incomparable_reason(runs: list[Run]) -> str | None:
    """Why the masks of these runs cannot be compared; None if they can."""
    pruned = [run for run in runs if run.record]
    for run in pruned[1:]:
        if run.model != pruned[0].model:
            return f"{pruned[0].name} and {run.name} are of different models, whose masks cannot be compared"
    return None if len(pruned) > 1 else "mask agreement needs two pruned runs"


def agreement(runs: list[Run]) -> list[tuple[Run, Run, Overlap, Overlap | None]]:
    """Compare the masks of every pair of pruned runs.

    Returns:
        for each pair the two runs, the overlap of their pruned weights, and the overlap of the weights that their
        rebuilds swapped (None unless both runs rebuilt and both starting masks are known).

    Raises:
        BarberError: the runs are of different models, or a mask file is missing or damaged.
    """
    reason = incomparable_reason(runs)
    if reason:
        raise BarberError(reason)
    runs = [run for run in runs if run.record]
    masks = [read_masks(run.masks) for run in runs]
    starts = [read_masks(run.start_masks) if _knows_swaps(run) else None for run in runs]
    shapes = masks[0].shapes
    for run, file in zip(runs, masks, strict=True):
        if file.shapes != shapes:
            raise BarberError(
                f"{run.masks}: its matrices differ from those of {runs[0].masks}; compare runs of the same model"
            )
    pairs = list(itertools.combinations(range(len(runs)), 2))
    pruned = [Overlap({}, {}) for _ in pairs]
    swapped = [Overlap({}, {}) if starts[a] and starts[b] else None for a, b in pairs]
    for name, shape in shapes.items():
        size = math.prod(shape)
        pruned_bits = [~_as_words(file.packed(name)) for file in masks]
        # A weight was swapped where the final mask differs from the starting mask.
        swapped_bits = [
            None if start is None else ~bits ^ _as_words(start.packed(name))
            for bits, start in zip(pruned_bits, starts, strict=True)
        ]
        for pair, (a, b) in enumerate(pairs):
            # The padding of the last word is zero in a mask file: it looks pruned in every mask, and never swapped.
            padding = pruned_bits[a].size * 64 - size
            pruned[pair].intersection[name] = _count_ones(pruned_bits[a] & pruned_bits[b]) - padding
            pruned[pair].union[name] = _count_ones(pruned_bits[a] | pruned_bits[b]) - padding
            if swapped[pair]:
                swapped[pair].intersection[name] = _count_ones(swapped_bits[a] & swapped_bits[b])
                swapped[pair].union[name] = _count_ones(swapped_bits[a] | swapped_bits[b])
    return [(runs[a], runs[b], p, s) for (a, b), p, s in zip(pairs, pruned, swapped, strict=True)]


def _knows_swaps(run: Run) -> bool:
    """Whether the run rebuilt its masks and its starting masks are available."""
    return run.record["options"]["rebuild"] and run.start_masks is not None


def _as_words(packed: np.ndarray) -> np.ndarray:
    """Packed bits, uint8 [n], as uint64 [ceil(n / 8)], padded with zeros."""
    return np.pad(packed, (0, -packed.size % 8)).view(np.uint64)


def _count_ones(words: np.ndarray) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
