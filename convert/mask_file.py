"""Re-exports `barber_jax.masks.mask_file` under its former path, which scripts use."""

from barber_jax.masks.mask_file import Masks, mask_metadata, pack, packed_length, read_masks, unpack

__all__ = ["Masks", "mask_metadata", "pack", "packed_length", "read_masks", "unpack"]
