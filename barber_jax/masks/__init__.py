"""Masks: sparsity patterns, exact selection of weights, and the mask file.

May import: console.

| module | what it holds |
|---|---|
| `pattern` | unstructured and N:M patterns |
| `selection` | exact selection of the weights that a score prunes, and LLM-Barber's swaps, on the devices |
| `top_k`, `keys` | the same with `jax.lax.top_k`; scores as integers |
| `selector` | which of the two selects in a matrix |
| `keep_pruned` | training with pruned weights held at zero, for optax |
| `mask_file` | masks.safetensors, our own format |

Only `pattern` and `mask_file` do without JAX. The rest is not imported here, so that PyTorch users can read mask files
without it.
"""

from barber_jax.masks.mask_file import Masks, pack, read_masks, unpack
from barber_jax.masks.pattern import SparsityPattern

__all__ = ["Masks", "SparsityPattern", "pack", "read_masks", "unpack"]
