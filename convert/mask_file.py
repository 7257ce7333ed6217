"""The mask file, under the name that scripts know: it lives in `barber_jax.masks`."""

from barber_jax.masks.mask_file import Masks, mask_metadata, pack, packed_length, read_masks, unpack

__all__ = ["Masks", "mask_metadata", "pack", "packed_length", "read_masks", "unpack"]
