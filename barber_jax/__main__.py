"""The `barber-jax` command: `barber-jax NAME` runs one of the programs `python -m barber_jax...`."""

import importlib
import sys

from barber_jax.console import startup
from barber_jax.console.errors import BarberError, exit_with_one_line

COMMANDS = {
    "prune": ("barber_jax.prune", "prune a checkpoint and rebuild its mask"),
    "recover": ("barber_jax.recover", "train the surviving weights of a pruned checkpoint"),
    "report": ("barber_jax.report", "regenerate report.html of a pruned or recovered checkpoint"),
    "perplexity": ("barber_jax.eval.perplexity", "measure the perplexity of a checkpoint"),
    "zero-shot": ("barber_jax.eval.zero_shot", "measure the accuracy of a checkpoint on lm-eval tasks"),
    "study": ("barber_jax.eval.study", "compare runs, or run a grid of them"),
    "benchmark": ("barber_jax.eval.benchmark", "measure the speed of a pruning run relative to the hardware's"),
    "convert": ("barber_jax.convert.__main__", "convert a checkpoint to another format"),
    "torch-masks": ("barber_jax.convert.apply_masks", "apply masks to a PyTorch model and check them"),
}
"""Name -> module, and the description in `barber-jax --help`."""


def dispatch() -> None:
    """Run the command named by the first command-line argument."""
    usage = "\n".join(f"  {name:12} {text}" for name, (_, text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: barber-jax COMMAND [options]\n\n{usage}\n\nbarber-jax COMMAND --help lists the options.")
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        raise BarberError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).run(sys.argv[2:])


def main() -> None:
    """Entry point of the console script."""
    startup.prepare()
    exit_with_one_line(dispatch)


if __name__ == "__main__":
    main()
