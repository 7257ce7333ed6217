"""Models: decoder families in Flax NNX, selected by the `model_type` of a Hugging Face configuration.

May import: console.

| module | what it holds |
|---|---|
| `llama`, `mistral`, `qwen`, `opt` | one family each |
| `decoder`, `rope` | shared by all families: block interface, rotary embedding |
| `attention` | shared by all families: attention, by platform |
| `family` | `Model`, the description of an architecture for the rest of the program; reading of config.json |
| `sharding` | how a block's arrays are sharded over a mesh |
"""

from barber_jax.console.errors import BarberError
from barber_jax.models import llama, mistral, opt, qwen
from barber_jax.models.family import Model

FAMILIES = {
    "llama": (llama.build, "LlamaForCausalLM"),
    "mistral": (mistral.build, "MistralForCausalLM"),
    "opt": (opt.build, "OPTForCausalLM"),
    "qwen2": (qwen.build_qwen2, "Qwen2ForCausalLM"),
    "qwen3": (qwen.build_qwen3, "Qwen3ForCausalLM"),
}
"""model_type -> (builder, the supported entry of `architectures`)."""


def build_model(config: dict, dtype) -> Model:
    """Build the `Model` that a config.json describes, computing in `dtype`.

    Raises:
        BarberError: an unknown model_type or architecture, a quantised checkpoint, or an unsupported entry.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BarberError(f"config.json: model_type {kind!r} is not supported (known: {', '.join(sorted(FAMILIES))})")
    build, architecture = FAMILIES[kind]
    listed = config.get("architectures") or [architecture]
    if not isinstance(listed, list):
        raise BarberError(f"config.json: architectures must be a list of names, not {listed!r}")
    for given in listed:
        if given != architecture:
            raise BarberError(f"config.json: architecture {given!r} is not supported, only {architecture}")
    if config.get("quantization_config"):
        raise BarberError(
            "config.json: quantization_config: a quantised checkpoint cannot be pruned; give the original"
        )
    return build(config, dtype)
