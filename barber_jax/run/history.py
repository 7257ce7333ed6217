"""Finished blocks of a run, in the form in which a resumed run needs them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from barber_jax.devices.mesh import share
from barber_jax.masks.mask_file import pack, unpack
from barber_jax.run.run_state import RunState


@dataclass
class Commit:
    """One finished block. Keys are kernel paths.

    Attributes:
        masks: bool [out, in], True = kept.
        weights: [in, out], where they are not the checkpoint's.
        start_masks, start_weights: the same of the start, where stream A went through them; else empty.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    start_masks: dict[str, np.ndarray]
    start_weights: dict[str, np.ndarray]
    record: dict

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by unique names, masks packed."""
        named = {"mask": self.masks, "start_mask": self.start_masks}
        named = {kind: {path: pack(mask) for path, mask in masks.items()} for kind, masks in named.items()}
        named |= {"weight": self.weights, "start_weight": self.start_weights}
        return {f"{kind}/{path}": array for kind, arrays in named.items() for path, array in arrays.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], record: dict, shapes: Mapping[str, tuple[int, ...]]) -> "Commit":
        """The inverse of `arrays`; `shapes` are the kernels' [in, out]."""
        parts: dict[str, dict[str, np.ndarray]] = {"mask": {}, "weight": {}, "start_mask": {}, "start_weight": {}}
        for name, array in arrays.items():
            kind, _, path = name.partition("/")
            parts[kind][path] = unpack(array, shapes[path][::-1]) if kind.endswith("mask") else array
        return cls(parts["mask"], parts["weight"], parts["start_mask"], parts["start_weight"], record)


@dataclass
class History:
    """Finished blocks, for every process: the primary one keeps them, the others are told.

    Attributes:
        state: where they are kept; None on other processes, and where nothing is to be kept.
        finished: how many there are, from the first on.
    """

    state: RunState | None = None
    finished: int = field(init=False)

    def __post_init__(self):
        self.finished = share(lambda: self.state.finished if self.state else 0)

    def load(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> Commit:
        """A finished block; `shapes` are the kernels' [in, out]."""
        arrays, record = share(lambda: self.state.load(index))
        return Commit.of(arrays, record, shapes)

    def commit(self, index: int, commit: Commit) -> None:
        """Keep a block."""
        if self.state:
            self.state.commit(index, commit.arrays(), commit.record)
