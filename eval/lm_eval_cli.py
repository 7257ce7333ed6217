"""python -m barber_jax.eval.lm_eval_cli: lm-eval's own command line, with `--model barber_jax` known to it.

lm-eval finds models in its own registry and has no plug-ins, so ours is registered first.
"""

import sys

from barber_jax.console.errors import exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.devices.settings import set_compilation_cache


def run(arguments: list[str] | None = None) -> None:
    """Hand the arguments (None: sys.argv) to lm-eval."""
    with needs("eval"):
        from lm_eval.__main__ import cli_evaluate

        import barber_jax.eval.language_model  # noqa: F401 - registers the model
    set_compilation_cache(None)
    if arguments is not None:
        sys.argv[1:] = arguments
    cli_evaluate()


if __name__ == "__main__":
    exit_with_one_line(run)
