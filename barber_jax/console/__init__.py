"""Console: what every command shares, from errors to progress.

May import: nothing of this package.

| module | what it holds |
|---|---|
| `errors` | `BarberError`, the one line that a user sees |
| `command`, `options` | command-line parsing; groups of options |
| `extras` | optional packages |
| `progress` | the live bar and plain lines on stderr |
| `interrupt` | Ctrl-C that is not lost |
| `files` | errors of the file system |
"""

from barber_jax.console.errors import BarberError, DamagedInput, exit_with_one_line

__all__ = ["BarberError", "DamagedInput", "exit_with_one_line"]
