"""python -m barber_jax.eval.lm_eval_cli: lm-eval's command line with `--model barber_jax` available.

lm-eval has no plug-in mechanism for models, so this command registers the model class before it calls lm-eval.
"""

import sys

from barber_jax.console.errors import exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.devices.settings import prepare_jax


def run(arguments: list[str] | None = None) -> None:
    """Run lm-eval's command line with the arguments (None: sys.argv)."""
    with needs("eval"):
        from lm_eval.__main__ import cli_evaluate

        import barber_jax.eval.language_model  # noqa: F401 - registers the model
    prepare_jax()
    if arguments is not None:
        sys.argv[1:] = arguments
    cli_evaluate()


if __name__ == "__main__":
    exit_with_one_line(run)
