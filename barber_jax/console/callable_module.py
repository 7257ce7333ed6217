"""Modules that are functions: `barber_jax.prune` is the module of `python -m barber_jax.prune`, and may be called."""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType


def make_callable(name: str, function: Callable) -> None:
    """Let calling the module `name`, which is being imported, call `function`, defined in it.

    A package has one attribute of a name: once its submodule is imported, that is the module, whatever a function of
    the same name was there before. So the module itself takes the call. Its attributes stay what they are.
    """

    class CallableModule(ModuleType):
        __call__ = staticmethod(function)

    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__signature__ = inspect.signature(function)
