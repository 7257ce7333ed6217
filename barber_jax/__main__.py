"""The `barber-jax` command: the same programs as `python -m barber_jax...`, by name."""

import importlib
import sys

from barber_jax.console.errors import BarberError, exit_with_one_line

COMMANDS = {
    "prune": ("barber_jax.prune", "prune a checkpoint and rebuild its mask"),
    "report": ("barber_jax.report", "make report.html of a pruned checkpoint anew"),
    "perplexity": ("barber_jax.eval.perplexity", "perplexity of a checkpoint"),
    "zero-shot": ("barber_jax.eval.zero_shot", "accuracy of a checkpoint on lm-eval tasks"),
    "study": ("barber_jax.eval.study", "compare runs, or run a grid of them"),
    "benchmark": ("barber_jax.eval.benchmark", "speed of a pruning, against the hardware's"),
    "convert": ("barber_jax.convert.__main__", "write a checkpoint in another format"),
    "torch-masks": ("barber_jax.convert.apply_masks", "apply and check masks in PyTorch"),
}


def dispatch() -> None:
    """Run the command that the first argument names."""
    usage = "\n".join(f"  {name:12} {text}" for name, (_, text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: barber-jax COMMAND [options]\n\n{usage}\n\nbarber-jax COMMAND --help tells the options.")
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        raise BarberError(f"no command {name!r}; known: {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).run(sys.argv[2:])


def main() -> None:
    """Entry point of the console script."""
    exit_with_one_line(dispatch)


if __name__ == "__main__":
    main()
