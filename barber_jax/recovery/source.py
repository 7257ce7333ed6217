"""The masks that a recovery starts from: a mask file's, the checkpoint's own, or its zeros."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.criteria.starting import check_names_and_shapes, check_pattern
from barber_jax.masks.mask_file import FILE_NAME, Masks, read_masks
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.models.family import Model

SPARSE = 0.01
"""Share of zeros among the prunable weights from which a checkpoint counts as pruned."""


@dataclass(frozen=True)
class MaskSource:
    """Where masks come from.

    Attributes:
        read: returns the mask of a weight, bool [out, in], True = kept, by its Hugging Face name.
        pattern: "unstructured" or N:M such as "2:4".
        sparsity: fraction of the prunable weights that is pruned.
        file: the mask file, opened, if there is one.
    """

    read: Callable[[str], np.ndarray]
    pattern: str
    sparsity: float
    file: Masks | None = None


def open_masks(given: Path | None, checkpoint: Checkpoint, model: Model) -> MaskSource:
    """Find the masks of a pruned checkpoint and check them against its weights. Reads every prunable weight.

    Args:
        given: mask file; None for the one beside the checkpoint's weights, else the masks or zeros of the weights.

    Raises:
        BarberError: a mask file is damaged or of another model; it prunes weights that the checkpoint keeps, although
            the checkpoint is pruned; or there is no mask file and the checkpoint is dense.
    """
    beside = checkpoint.sources()[0].parent / FILE_NAME
    path = expand(given) if given else beside if beside.is_file() else None
    masks = read_masks(path) if path else None
    if masks:
        check_names_and_shapes(masks.shapes, model.pruned_names(), checkpoint, f"{masks.path}: mask")

    def own(name: str) -> np.ndarray:
        mask = checkpoint.mask(name)
        return checkpoint.read(name) != 0 if mask is None else mask

    pruned, zeros, first = _count(masks, own, checkpoint, model)
    total = sum(checkpoint.size(name) for name in model.pruned_names())
    if masks:
        if first and zeros >= SPARSE * total:
            raise BarberError(
                f"{masks.path} prunes weights of {first} that {checkpoint.location} keeps, although that is pruned; "
                "give the masks of this checkpoint"
            )
        return MaskSource(masks.read, masks.pattern, pruned / total, masks)
    if zeros < SPARSE * total:
        raise BarberError(
            f"{checkpoint.location} is not pruned ({zeros} of {total} prunable weights are 0) and there is no "
            f"{FILE_NAME} beside it; give a pruned checkpoint, or --masks"
        )
    return MaskSource(own, "unstructured", zeros / total)


def _count(
    masks: Masks | None, own: Callable[[str], np.ndarray], checkpoint: Checkpoint, model: Model
) -> tuple[int, int, str | None]:
    """Weights that the mask file prunes; weights that are zero; and the first name with a weight of neither kind."""
    pruned, zeros, first = 0, 0, None
    for name in model.pruned_names():
        kept = own(name)
        zeros += int(kept.size - np.count_nonzero(kept))
        if masks:
            mask = masks.read(name)
            check_pattern(mask, SparsityPattern.parse(masks.pattern, None), f"{masks.path}: {name}")
            pruned += int(mask.size - np.count_nonzero(mask))
            if first is None and np.any(kept & ~mask):
                first = name
    return pruned, zeros, first
