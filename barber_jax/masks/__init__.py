"""Masks: sparsity patterns, exact selection of weights, and the mask file.

May import: console.

| module | what it holds |
|---|---|
| `pattern` | unstructured and N:M patterns |
| `selection` | exact selection of the weights that a score prunes, and LLM-Barber's swaps, on the devices |
| `mask_file` | masks.safetensors, our own format |

Only `selection` needs JAX. It is not imported here, so that PyTorch users can read mask files without JAX.
"""

from barber_jax.masks.mask_file import Masks, pack, read_masks, unpack
from barber_jax.masks.pattern import SparsityPattern

__all__ = ["Masks", "SparsityPattern", "pack", "read_masks", "unpack"]
