"""LLM-Barber (arXiv 2408.10631) in JAX/Flax: rebuild the sparsity mask of a pruned language model, block by block."""

__version__ = "0.1.0"
