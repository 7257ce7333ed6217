"""Models: decoder families in Flax NNX, selected by the `model_type` of a Hugging Face configuration.

May import: console.

| module | what it holds |
|---|---|
| `llama`, `mistral`, `qwen`, `gemma`, `opt` | one family each |
| `decoder`, `rope` | shared by all families: block interface, rotary embedding |
| `attention` | shared by all families: attention, by platform |
| `family` | `Model`, the description of an architecture for the rest of the program; reading of config.json |
| `numbers` | which numbers float32 can hold |
| `sharding` | how a block's arrays are sharded over a mesh |
"""

from barber_jax.console.errors import BarberError
from barber_jax.models import gemma, llama, mistral, opt, qwen
from barber_jax.models.family import Model

FAMILIES = {
    "gemma2": (gemma.build_gemma2, "Gemma2ForCausalLM"),
    "gemma3": (gemma.build_gemma3, "Gemma3ForConditionalGeneration"),
    "gemma3_text": (gemma.build_gemma3_text, "Gemma3ForCausalLM"),
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
        if not isinstance(given, str) or given.lower() not in _names_of(architecture):
            raise BarberError(f"config.json: architecture {given!r} is not supported, only {architecture}")
    _check_unquantised(config.get("quantization_config"))
    if config.get("is_causal", True) is not True:
        raise BarberError(
            f"config.json: is_causal {config['is_causal']!r}: attention in both directions is not supported; "
            "give a causal language model"
        )
    return build(config, dtype)


def plain_config(config: dict) -> dict:
    """The config.json of a supported model for a folder that holds the whole model in plain tensors.

    Its architecture is the supported one where it was the base model's (LlamaModel) or an old spelling
    (LLaMAForCausalLM), and a quantization_config, which said only that the weights were sparse, is left out.
    """
    _, architecture = FAMILIES.get(config.get("model_type"), (None, None))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain | {"architectures": [architecture]} if architecture and plain.get("architectures") else plain


def _names_of(architecture: str) -> set[str]:
    """Names of a model in `architectures`, in lower case: its own, and that of the base model without its head."""
    return {architecture.lower(), architecture.lower().replace("forcausallm", "model")}


def _check_unquantised(settings) -> None:
    """Raise BarberError for a quantised checkpoint, or one of compressed tensors.

    llm-compressor writes a quantization_config for a model that is only sparse too; its weights may be plain tensors.
    """
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else {}
    sparsity = settings.get("sparsity_config")
    sparsity = sparsity if isinstance(sparsity, dict) else {}
    plain = (None, "dense")
    quantised = settings.get("quant_method") != "compressed-tensors" or any(
        settings.get(key) for key in ("config_groups", "kv_cache_scheme")
    )
    if quantised or (not sparsity and settings.get("format") not in plain):
        raise BarberError(
            "config.json: quantization_config: a quantised checkpoint cannot be pruned; give the original"
        )
    stored = next((form for form in (sparsity.get("format"), settings.get("format")) if form not in plain), None)
    if stored:
        raise BarberError(
            f"config.json: quantization_config: a sparse checkpoint, not quantised, but stored as {stored!r}; "
            "save it again with save_compressed=False (llm-compressor) or give the original"
        )
