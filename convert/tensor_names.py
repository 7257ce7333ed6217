"""Maps the names under which a checkpoint stores its tensors to Hugging Face's names of the whole model."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from barber_jax.console.errors import BarberError

BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", "decoder.version")
"""Endings of the names of tensors that are computed, not parameters: they are not read, whatever their dtype."""

_INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before any module's name."""
_OUTER_WRAPPERS = ("module.", "base_model.model.")
"""What DistributedDataParallel and PEFT put before every name."""
_PRUNED = re.compile(r"(.*\.(?:weight|bias))_(orig|mask)")


class StoredNames(NamedTuple):
    """Stored names of a checkpoint's tensors.

    Attributes:
        tensors: Hugging Face name -> stored name.
        masks: Hugging Face name -> stored name of the mask that torch.nn.utils.prune left beside the unpruned tensor.
    """

    tensors: dict[str, str]
    masks: dict[str, str]


def stored_names(names: Iterable[str], family: object, location: str) -> StoredNames:
    """Find the Hugging Face names of stored tensors, in order, without buffers.

    Prefixes of wrappers are removed. What was saved from the base model without its head, OPT's published checkpoints
    among them, gets its prefix `model.` back (OPT's decoder alone `model.decoder.`). `X_orig` and `X_mask`, as left by
    torch.nn.utils.prune, are the tensor X and its mask. A Gemma 3 with a vision tower has the names under which every
    version of transformers saves it, whatever the modules were called in memory.

    Args:
        names: stored names.
        family: model_type of config.json.
        location: of the checkpoint, for messages.

    Raises:
        BarberError: PEFT's adapters are among the tensors; two of them have the same name; or one of `X_orig` and
            `X_mask` is missing.
    """
    tensors, masks, halves = {}, {}, {}
    for stored, name in _full_names(list(names), family, location).items():
        if name.endswith(BUFFERS):
            continue
        pruned = _PRUNED.fullmatch(name)
        name, kind = pruned.groups() if pruned else (name, None)
        table = masks if kind == "mask" else tensors
        if name in table:
            raise BarberError(f"{location}: {table[name]} and {stored} are both tensor {name}; keep one of them")
        table[name] = stored
        if pruned:
            halves.setdefault(name, set()).add(kind)
    for name, kinds in halves.items():
        if len(kinds) == 1:
            (kind,) = {"orig", "mask"} - kinds
            raise BarberError(
                f"{location}: tensor {name}_{kind} is missing beside what torch.nn.utils.prune left of {name}; "
                "save the model again after torch.nn.utils.prune.remove"
            )
    return StoredNames(tensors, masks)


def _full_names(names: list[str], family: object, location: str) -> dict[str, str]:
    """Stored name -> full name."""
    full = {name: _INNER_WRAPPERS.sub("", name) for name in names}
    while wrapper := next((w for w in _OUTER_WRAPPERS if full and all(n.startswith(w) for n in full.values())), None):
        full = {stored: _INNER_WRAPPERS.sub("", name.removeprefix(wrapper)) for stored, name in full.items()}
    adapter = next((name for name in names if re.search(r"\.(lora_\w+|base_layer|modules_to_save)\.", name)), None)
    if adapter:
        raise BarberError(
            f"{location}: tensor {adapter} belongs to a PEFT adapter that is not merged; "
            "save the model again after merge_and_unload()"
        )
    if family == "gemma3":
        return {stored: _gemma3(name) for stored, name in full.items()}
    if any(name.startswith("model.") for name in full.values()):
        return full
    decoder_alone = family == "opt" and not any(name.startswith("decoder.") for name in full.values())
    prefix = "model.decoder." if decoder_alone else "model."
    return {stored: name if name.startswith("lm_head.") else prefix + name for stored, name in full.items()}


def _gemma3(name: str) -> str:
    """The name under which transformers saves a tensor of a Gemma 3 with a vision tower."""
    # As modules have been called since transformers 4.52.
    for inner, saved in (("model.language_model.", "language_model.model."), ("model.", "")):
        if name.startswith(inner):
            return saved + name.removeprefix(inner)
    # A head beside the tied embedding is a copy of it, wherever it stands.
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name
