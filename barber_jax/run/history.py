"""Finished blocks of a run: what a resumed run needs of each, and access to them from every process."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from barber_jax.devices.mesh import broadcast_arrays, broadcast_from_primary
from barber_jax.masks.mask_file import pack, unpack
from barber_jax.run.run_state import RunState


@dataclass
class Commit:
    """One finished block.

    Attributes:
        masks: kernel path -> bool [out, in], True = kept.
        weights: parameter path -> weights where they differ from the dense ones; kernels [in, out].
        start_masks, start_weights: starting masks and weights in the same form. Empty where a resumed run does not
            need them.
        record: the block's entry in run.json.
    """

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    start_masks: dict[str, np.ndarray]
    start_weights: dict[str, np.ndarray]
    record: dict

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays under unique names, with packed masks."""
        named = {"mask": self.masks, "start_mask": self.start_masks}
        named = {kind: {path: pack(mask) for path, mask in masks.items()} for kind, masks in named.items()}
        named |= {"weight": self.weights, "start_weight": self.start_weights}
        return {f"{kind}/{path}": array for kind, arrays in named.items() for path, array in arrays.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], record: dict, shapes: Mapping[str, tuple[int, ...]]) -> "Commit":
        """Inverse of `arrays`.

        Args:
            shapes: kernel path -> [in, out].
        """
        parts: dict[str, dict[str, np.ndarray]] = {"mask": {}, "weight": {}, "start_mask": {}, "start_weight": {}}
        for name, array in arrays.items():
            kind, _, path = name.partition("/")
            parts[kind][path] = unpack(array, shapes[path][::-1]) if kind.endswith("mask") else array
        return cls(parts["mask"], parts["weight"], parts["start_mask"], parts["start_weight"], record)


@dataclass
class History:
    """Finished blocks of a run, which the primary process stores and broadcasts to the others.

    Attributes:
        state: the stored blocks; None on other processes, and where blocks are not stored.
        finished: number of blocks that were finished at the start: blocks 0 to finished - 1.
    """

    state: RunState | None = None
    finished: int = field(init=False)

    def __post_init__(self):
        self.finished = broadcast_from_primary(lambda: self.state.finished if self.state else 0)

    def load(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> Commit:
        """Load a finished block on every process.

        Args:
            index: of the block.
            shapes: kernel path -> [in, out].
        """
        arrays, record = broadcast_arrays(lambda: self.state.load(index))
        return Commit.of(arrays, record, shapes)

    def commit(self, index: int, commit: Commit) -> None:
        """Store a block, on the primary process."""
        if self.state:
            self.state.commit(index, commit.arrays(), commit.record)
