"""The begin token in front of calibration samples and evaluation windows.

Most models do as well without; some were trained with it in front of every text and are far worse where it is missing.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from barber_jax.console.errors import BarberError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BeginToken = Literal["auto", "always", "never"]
"""auto: where the tokenizer puts it, at the start of a whole text, which is the convention of the field. always: in
front of every sample and window. never: nowhere, and no other special token either."""


def settled(choice: BeginToken, relies: bool) -> BeginToken:
    """What a choice means for a model: `auto` is `always` where the model `relies` on the token."""
    return "always" if choice == "auto" and relies else choice


def tokenizer_for(choice: BeginToken, tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> Callable[[], Any]:
    """A function that returns the tokenizer, called as usual, without special tokens unless the choice is `auto`."""
    if choice == "auto":
        return tokenizer

    def plain() -> Any:
        made = tokenizer()
        without = partial(made, add_special_tokens=False)
        # Errors name it.
        without.name_or_path = getattr(made, "name_or_path", "")
        return without

    return plain


def begin_id(choice: BeginToken, tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> int | None:
    """Id of the token that every sample and window begins with; None unless the choice is `always`.

    Raises:
        BarberError: the tokenizer has no begin token.
    """
    if choice != "always":
        return None
    made = tokenizer()
    if made.bos_token_id is None:
        raise BarberError(
            f"--begin-token always: {getattr(made, 'name_or_path', '') or 'the tokenizer'} has no begin token "
            "(bos_token in tokenizer_config.json); add it or give --begin-token never"
        )
    return made.bos_token_id


def begun(windows: np.ndarray, token: int | None) -> np.ndarray:
    """Windows [N, L] with the token in front of each, [N, L + 1]; as they are if it is None."""
    return windows if token is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=token)
