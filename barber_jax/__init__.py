"""LLM-Barber (arXiv 2408.10631) in JAX/Flax: rebuild the sparsity mask of a pruned language model, block by block."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout `convert/` and `eval/` stand beside this folder, and only an installation puts them inside it. Where
# they are not inside, submodules are looked for in the checkout's root too, so that a clone works as it stands.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "barber_jax" / "convert").exists() and (_root / "convert" / "safetensors_writer.py").exists():
    __path__.append(str(_root))
