"""How far masks agree: the Jaccard index |A and B| / |A or B| of pruned sets, and of the sets of swapped weights.

Counted on packed bits, a matrix at a time: eight weights a byte, nothing is unpacked.
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
    """Sizes of the intersection and the union of two sets of weights, matrix by matrix."""

    both: dict[str, int]
    either: dict[str, int]

    @property
    def matrices(self) -> dict[str, float]:
        """Jaccard index in each matrix; two empty sets agree."""
        return {name: _jaccard(self.both[name], self.either[name]) for name in self.both}

    @property
    def whole(self) -> float:
        """Jaccard index over all matrices together."""
        return _jaccard(sum(self.both.values()), sum(self.either.values()))

    def summary(self) -> dict:
        """For a JSON file."""
        least = min(self.matrices.values())
        return {"jaccard": self.whole, "lowest_matrix": least, "matrices": self.matrices}


def _jaccard(both: int, either: int) -> float:
    return both / either if either else 1.0


def refusal(runs: list[Run]) -> str | None:
    """Why the masks of these runs cannot be compared, or None."""
    pruned = [run for run in runs if run.record]
    for run in pruned[1:]:
        if run.model != pruned[0].model:
            return f"{pruned[0].name} and {run.name} are of different models, whose masks cannot be compared"
    return None if len(pruned) > 1 else "mask agreement needs two pruned runs"


def agreement(runs: list[Run]) -> list[tuple[Run, Run, Overlap, Overlap | None]]:
    """Every pair of pruned runs: overlap of pruned sets, and of swaps where both runs' starting masks are known.

    Raises:
        BarberError: the runs are of different models, or a mask file is missing or damaged.
    """
    reason = refusal(runs)
    if reason:
        raise BarberError(reason)
    runs = [run for run in runs if run.record]
    masks = [read_masks(run.masks) for run in runs]
    starts = [read_masks(run.start_masks) if _swaps(run) else None for run in runs]
    shapes = masks[0].shapes
    for run, file in zip(runs, masks, strict=True):
        if file.shapes != shapes:
            raise BarberError(f"{run.masks}: other matrices than in {runs[0].masks}; they are of different models")
    pairs = list(itertools.combinations(range(len(runs)), 2))
    pruned = [Overlap({}, {}) for _ in pairs]
    swapped = [Overlap({}, {}) if starts[a] and starts[b] else None for a, b in pairs]
    for name, shape in shapes.items():
        size = math.prod(shape)
        cut = [~_padded(file.packed(name)) for file in masks]
        # A weight whose start and end differ was swapped.
        moved = [
            None if start is None else ~bits ^ _padded(start.packed(name))
            for bits, start in zip(cut, starts, strict=True)
        ]
        for place, (a, b) in enumerate(pairs):
            # What fills up the last byte is no weight: zero in a mask, so one among the pruned, zero among swaps.
            extra = cut[a].size * 64 - size
            pruned[place].both[name] = _count(cut[a] & cut[b]) - extra
            pruned[place].either[name] = _count(cut[a] | cut[b]) - extra
            if swapped[place]:
                swapped[place].both[name] = _count(moved[a] & moved[b])
                swapped[place].either[name] = _count(moved[a] | moved[b])
    return [(runs[a], runs[b], p, s) for (a, b), p, s in zip(pairs, pruned, swapped, strict=True)]


def _swaps(run: Run) -> bool:
    return run.record["options"]["rebuild"] and run.start_masks is not None


def _padded(packed: np.ndarray) -> np.ndarray:
    """Bytes as 64-bit words, zeros at the end."""
    return np.pad(packed, (0, -packed.size % 8)).view(np.uint64)


def _count(words: np.ndarray) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
