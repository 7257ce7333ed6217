"""Loads a checkpoint with transformers as a model in PyTorch, and never runs code of the checkpoint's own."""

from typing import TYPE_CHECKING, Any

from barber_jax.console import causes
from barber_jax.console.errors import BarberError

if TYPE_CHECKING:
    import transformers


def load_model(spec: str, option: str, attention: str = "sdpa", **settings: Any) -> "transformers.PreTrainedModel":
    """Load a causal language model.

    Args:
        spec: folder or Hub id.
        option: by which it was given, for messages.
        attention: implementation of attention. Never what the checkpoint asks for: config.json may name a repository
            of the Hub, from which transformers would fetch native code.
        settings: further arguments of `from_pretrained`.

    Raises:
        BarberError: transformers cannot load it, a tensor is missing, or it is code of the checkpoint's own.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=False)
        config._attn_implementation = attention
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            spec, config=config, trust_remote_code=False, output_loading_info=True, **settings
        )
    except BaseException as error:  # transformers passes on exceptions of its file readers, of many types
        if not causes.is_foreign(error):
            raise
        if "trust_remote_code" in str(error):
            raise BarberError(
                f"{option} {spec}: it is Python code of the checkpoint's own (auto_map in config.json), which is never "
                "run; load the model in a program of your own and use barber_jax.convert.torch_masks there"
            ) from None
        raise BarberError(f"{option} {spec}: cannot load it: {str(error) or type(error).__name__}") from error
    if loading["missing_keys"]:
        # transformers fills it with random weights and goes on.
        raise BarberError(
            f"{option} {spec}: tensor {min(loading['missing_keys'])} is not in it under this name; "
            "python -m barber_jax.convert writes the model with the usual names"
        )
    return model
