"""Values of options: from the texts of a settings file to the options' types, and bounds that hold for every option.

Settings files give values, never words of a command line: a value cannot name another option.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from barber_jax.console.documents import is_unicode
from barber_jax.console.errors import BarberError
from barber_jax.console.options import flag

MAX_INTEGER = 2**63 - 1


def check_values(options: Mapping[str, Any]) -> None:
    """Raise `BarberError` for a value that no option can take, whether or not the option is used.

    That is an integer beyond 64 bits, or a text or path that is not UTF-8, which could be written into no file.
    """
    for option, given in options.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise BarberError(f"{flag(option)} {value} is out of range; give a number below 2**63")
            if isinstance(value, str | Path):
                shown = str(value)
                # A relative path is as bad as the folder it is relative to.
                full = os.path.abspath(os.path.expanduser(value)) if isinstance(value, Path) else shown
                if not is_unicode(shown) or not is_unicode(full):
                    raise BarberError(f"{flag(option)} {full!r} is not UTF-8; rename it, or choose another name")
                if "\0" in shown:
                    raise BarberError(f"{flag(option)} {shown!r} holds a null character; leave it out")


def typed(options: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Convert the values of a settings file to the types of the options of a dataclass.

    Args:
        options: option -> text, number or boolean; for an option that takes several values, also a list of these.
        config: dataclass with the options as fields.

    Raises:
        BarberError: a value is not of its option's type.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    out = {}
    for name, value in options.items():
        try:
            out[name] = _convert(kinds[name], value)
        except ValueError as error:
            raise BarberError(f"{flag(name)} {value!r}: {error}") from None
    check_values(out)
    return out


def words(options: Mapping[str, Any]) -> list[str]:
    """Command-line words for typed options; None and empty tuples are left out.

    Raises:
        BarberError: a value would be taken for an option.
    """
    line: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            line.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None and value != ():
            texts = [str(each) for each in (value if isinstance(value, tuple) else (value,))]
            for text in texts:
                if text.startswith("-"):
                    raise BarberError(f"{flag(name)} {text!r} begins like an option; write a path as ./{text}")
            line += [flag(name), *texts]
    return line


def _convert(kind: Any, value: Any) -> Any:
    """Convert one value to a type annotation; raise ValueError with what it must be."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _convert(arguments[0], value)
    if origin is tuple:
        return tuple(_convert(arguments[0], each) for each in (value if isinstance(value, list | tuple) else [value]))
    if isinstance(value, list | tuple | dict):
        raise ValueError("it takes one value, not several")
    if origin in (Union, UnionType):
        return _first_fit([each for each in arguments if each is not type(None)], value)
    if origin is Literal:
        if str(value) not in map(str, arguments):
            raise ValueError(f"choose one of {', '.join(map(str, arguments))}")
        return next(each for each in arguments if str(each) == str(value))
    if not isinstance(value, str | int | float):
        raise ValueError("it must be text or a number")
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError("it must be true or false")
        return str(value).lower() == "true"
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("it must be a number")
        try:
            return kind(str(value))
        except ValueError:
            raise ValueError(f"it must be {'an integer' if kind is int else 'a number'}") from None
    return kind(str(value))


def _first_fit(kinds: list[Any], value: Any) -> Any:
    """Convert to the first of several types that fits; the complaint is that of the last."""
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value)
        except ValueError:
            continue
    return _convert(kinds[-1], value)
