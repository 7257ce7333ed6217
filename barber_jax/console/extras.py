"""Packages that only some commands need."""

from collections.abc import Iterator
from contextlib import contextmanager

from barber_jax.console.errors import BarberError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports from an optional group of pyproject.toml.

    Raises:
        BarberError: one of them is not installed; the line says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("barber_jax"):
            raise
        raise BarberError(f"{error.name} is not installed; pip install 'barber_jax[{extra}]' brings it") from error
