"""Console: command-line code that every command shares: parsing, errors, progress, interrupts.

May import: nothing of this package.

| module | what it holds |
|---|---|
| `errors` | `BarberError`, printed as one line with exit status 2; shortening of messages |
| `causes` | causes of other exceptions; the log file of an unexpected one |
| `documents`, `structure` | the one reader of JSON, YAML and TOML; the structure that a document must have |
| `quiet` | what libraries print by themselves |
| `command`, `options`, `configuration` | command-line parsing; groups of options; all groups of a command in one |
| `values` | values of options: from a settings file, and bounds for all |
| `callable_module` | a command's module that is a function too |
| `extras` | optional packages |
| `progress` | live progress bar, or plain lines, on stderr |
| `notes` | single lines on stderr that are no error |
| `terminal` | consoles of rich for tables and lines |
| `interrupt` | reliable handling of Ctrl-C, SIGTERM and SIGHUP |
| `startup` | the time before `exit_with_one_line`: failing imports, and whether JAX can start |
| `streams` | standard streams that are closed, full or gone |
| `locks` | one lock per output folder; folders recognised by what they are |
| `files` | file-system errors while writing |
| `outputs` | files and folders that are seen whole or not at all |
"""

from barber_jax.console.errors import BarberError, DamagedInput, exit_with_one_line

__all__ = ["BarberError", "DamagedInput", "exit_with_one_line"]
