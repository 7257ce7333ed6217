"""LLM-Barber (arXiv 2408.10631) in JAX/Flax: rebuild the sparsity mask of a pruned language model, block by block.

The public Python API (docs/python.md) is the names below. They are imported when first used, so that `import
barber_jax` alone imports neither JAX nor NumPy nor PyTorch.
"""

import importlib as _importlib
from pathlib import Path as _Path
from typing import Any as _Any

from barber_jax.console import startup as _startup

__version__ = "0.2.0"

_PUBLIC = {
    "BarberError": "barber_jax.console",
    "PruneConfig": "barber_jax.config",
    "RecoverConfig": "barber_jax.recovery.recover_config",
    "build_model": "barber_jax.models",
    "generate": "barber_jax.forward.generation",
    "keep_pruned": "barber_jax.masks.keep_pruned",
    "load": "barber_jax.convert.flax_module",
    "open_checkpoint": "barber_jax.convert.checkpoint",
    "read_masks": "barber_jax.masks",
    "save": "barber_jax.convert.flax_module",
    "zero_pruned": "barber_jax.masks.keep_pruned",
}
"""Name -> the module that defines it."""
_COMMANDS = ("prune", "recover")
"""Modules at the top of the package that are the function of their name too (console/callable_module.py)."""
__all__ = sorted([*_PUBLIC, *_COMMANDS, "__version__"])

# In a checkout `convert/` and `eval/` stand beside this folder, and only an installation puts them inside it. Where
# they are not inside, submodules are searched for in the checkout's root too, so that a clone works as it stands.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "barber_jax" / "convert").exists() and (_root / "convert" / "safetensors_writer.py").exists():
    __path__.append(str(_root))

# Before any other import: what a command imports may fail, too.
if _startup.is_command():
    _startup.prepare()


def __getattr__(name: str) -> _Any:
    if name in _PUBLIC:
        return getattr(_importlib.import_module(_PUBLIC[name]), name)
    if name in _COMMANDS:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
