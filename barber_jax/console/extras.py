"""Imports of optional packages, with an error that says how to install them."""

from collections.abc import Iterator
from contextlib import contextmanager

from barber_jax.console.errors import BarberError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Context manager for imports of packages from an optional dependency group of pyproject.toml.

    Args:
        extra: name of the group, such as `torch`.

    Raises:
        BarberError: a package is not installed; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("barber_jax"):
            raise
        raise BarberError(f"{error.name} is not installed; pip install 'barber_jax[{extra}]' installs it") from error
