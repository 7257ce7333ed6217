"""Loads, applies and checks pruning masks in PyTorch, to fine-tune a pruned model with its zeros kept, without JAX.

    masks = load_masks("pruned/masks.safetensors")
    apply_masks(model, masks)       # torch.nn.utils.prune: the zeros stay zero during training
    ...                             # train
    make_permanent(model)           # plain weights again, ready for save_pretrained
    assert check_masks(model, masks).ok

Names are Hugging Face's, as in the mask file. `python -m barber_jax.convert.apply_masks` applies masks to a folder.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import prune

from barber_jax.console.errors import BarberError
from barber_jax.masks.mask_file import Masks, read_masks

MaskSource = Mapping[str, torch.Tensor] | Masks | str | os.PathLike


@dataclass(frozen=True)
class MatrixReport:
    """Weight counts of one matrix relative to its mask."""

    name: str
    size: int
    kept: int  # kept by the mask
    zeros: int  # zero in the weight
    violations: int  # pruned by the mask but not zero
    natural_zeros: int  # kept by the mask but zero

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the mask prunes."""
        return 1 - self.kept / self.size


@dataclass(frozen=True)
class Report:
    """Result of `check_masks` for a whole model, one entry per masked matrix."""

    matrices: tuple[MatrixReport, ...]

    @property
    def ok(self) -> bool:
        """True when every pruned weight is zero."""
        return not any(matrix.violations for matrix in self.matrices)

    @property
    def total(self) -> MatrixReport:
        """Sums over all matrices, under the name "total"."""
        counts = ("size", "kept", "zeros", "violations", "natural_zeros")
        return MatrixReport("total", **{key: sum(getattr(m, key) for m in self.matrices) for key in counts})

    def table(self) -> str:
        """A text table with one line per matrix and one for the total."""
        rows = [*self.matrices, self.total]
        width = max(len(row.name) for row in rows)
        lines = [f"{'weight':<{width}}  {'size':>12}  {'sparsity':>8}  {'zeros':>12}  {'violations':>10}"]
        lines += [
            f"{row.name:<{width}}  {row.size:>12}  {row.sparsity:>8.4f}  {row.zeros:>12}  {row.violations:>10}"
            for row in rows
        ]
        return "\n".join(lines)


def load_masks(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read all masks of a mask file: weight name -> bool [out, in], True = kept. Raises BarberError on a bad file.

    The masks take one byte per weight. For a large model, pass the path to `apply_masks` and `check_masks` instead;
    they then read one mask at a time.
    """
    masks = read_masks(path)
    return {name: torch.from_numpy(masks.read(name)) for name in masks.names()}


def apply_masks(model: torch.nn.Module, masks: MaskSource, method: Literal["prune", "in_place"] = "prune") -> None:
    """Set the pruned weights of `model` to zero.

    All names and shapes are checked before anything changes. On a module that torch.nn.utils.prune has already pruned,
    the new mask replaces the old one and applies to the original weights, so weights that only the old mask pruned
    are restored.

    Args:
        model: a model whose nn.Linear weights have the masks' names; a base model (LlamaModel) may lack the prefix.
        masks: weight name -> bool [out, in] with True = kept, an open mask file, or its path.
        method: "prune" reparametrises with torch.nn.utils.prune, so that the zeros survive training (`make_permanent`
            undoes it); "in_place" writes zeros into the weights once.

    Raises:
        BarberError: a bad mask file, a name that the model lacks, a weight that is not an nn.Linear's, or a shape that
            differs.
    """
    if method not in ("prune", "in_place"):
        raise ValueError(f"method {method!r} is neither 'prune' nor 'in_place'")
    for _, module, mask in _matched(model, masks):
        if _is_pruned(module):
            module.weight_mask = mask.to(module.weight_orig.device, module.weight_orig.dtype)
            module.weight = module.weight_orig * module.weight_mask
            if method == "in_place":
                prune.remove(module, "weight")
        elif method == "prune":
            prune.custom_from_mask(module, "weight", mask.to(module.weight.device))
        else:
            with torch.no_grad():
                module.weight.masked_fill_(~mask.to(module.weight.device), 0)


def make_permanent(model: torch.nn.Module) -> None:
    """Convert every pruned nn.Linear of `model` back to one with a plain weight, whose pruned entries are zero.

    Call this before `save_pretrained`: the state dict would otherwise contain weight_orig and weight_mask.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and _is_pruned(module):
            prune.remove(module, "weight")


def check_masks(model: torch.nn.Module, masks: MaskSource) -> Report:
    """Compare the weights of `model`, plain or pruned by torch.nn.utils.prune, with the masks; changes nothing.

    Raises:
        BarberError: as `apply_masks`.
    """
    return Report(tuple(_check(name, module, mask) for name, module, mask in _matched(model, masks)))


def to_semi_structured(model: torch.nn.Module, masks: MaskSource) -> None:
    """Compress the 2:4-pruned weights of `model` for the sparse tensor cores of NVIDIA Ampere and later GPUs.

    For inference only: weights become `torch.sparse.SparseSemiStructuredTensor`, half the size and not trainable.
    The model must be on a CUDA device in float16 or bfloat16, and its pruned weights must already be zero:
        model = AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.float16).cuda()
        to_semi_structured(model, "pruned/masks.safetensors")

    Raises:
        BarberError: as `apply_masks`; no CUDA device of compute capability 8.0 or later; a mask that is not 2:4; or a
            weight that is not on a CUDA device, has another dtype, is not zero where its mask prunes, or has a shape
            that the kernels do not support.
    """
    if not torch.cuda.is_available():
        raise BarberError("semi-structured weights need a CUDA device; run on a machine with one")
    if torch.cuda.get_device_capability() < (8, 0):
        raise BarberError("the GPU lacks sparse tensor cores (compute capability 8.0 or later); keep the model dense")
    if isinstance(masks, str | os.PathLike):
        masks = read_masks(masks)
    if isinstance(masks, Masks) and masks.pattern != "2:4":
        raise BarberError(f"{masks.path}: its pattern is {masks.pattern}, not 2:4; prune the model with pattern 2:4")
    for name, module, mask in _matched(model, masks):
        _check_semi_structured(name, module, mask)
    make_permanent(model)
    for name, module, _ in _matched(model, masks):
        try:
            weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        except RuntimeError as error:
            raise BarberError(f"{name}: the sparse kernels refuse it: {error}; keep this model dense") from error
        module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _check_semi_structured(name: str, module: torch.nn.Linear, mask: torch.Tensor) -> None:
    """Raise BarberError, as `to_semi_structured`, unless a weight can be compressed."""
    weight = _effective_weight(module)
    if mask.shape[1] % 4 or int(mask.reshape(-1, 4).sum(1).max()) > 2:
        raise BarberError(f"{name}: its mask is not 2:4; prune the model with pattern 2:4")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise BarberError(f"{name} is {weight.dtype}; load the model with dtype=torch.float16 or torch.bfloat16")
    if _check(name, module, mask).violations:
        raise BarberError(f"{name} is not zero where its mask prunes; call apply_masks first")
    if weight.device.type != "cuda":
        raise BarberError(f"{name} is on {weight.device}; move the model to the GPU with model.cuda()")


def _is_pruned(module: torch.nn.Module) -> bool:
    return hasattr(module, "weight_orig") and hasattr(module, "weight_mask")


def _effective_weight(module: torch.nn.Linear) -> torch.Tensor:
    # Between an optimiser step and the next forward pass, the `weight` of a pruned module is out of date.
    return (module.weight_orig * module.weight_mask if _is_pruned(module) else module.weight).detach()


def _check(name: str, module: torch.nn.Linear, mask: torch.Tensor) -> MatrixReport:
    weight = _effective_weight(module)
    mask = mask.to(weight.device)
    zero = weight == 0
    return MatrixReport(
        name=name,
        size=mask.numel(),
        kept=int(mask.sum()),
        zeros=int(zero.sum()),
        violations=int((~mask & ~zero).sum()),
        natural_zeros=int((mask & zero).sum()),
    )


def _matched(model: torch.nn.Module, masks: MaskSource) -> Iterator[tuple[str, torch.nn.Linear, torch.Tensor]]:
    """Yield (name, module, mask) of every masked weight; all names and shapes are checked before a mask is read."""
    shapes, read = _open(masks)
    # `base_model_prefix`: the name prefix that a model with a head has and its base model lacks.
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    matched = {name: _linear(modules, prefix, name, shape) for name, shape in shapes.items()}
    for name, module in matched.items():
        yield name, module, read(name)


def _open(masks: MaskSource) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    if isinstance(masks, str | os.PathLike):
        masks = read_masks(masks)
    if isinstance(masks, Masks):
        return masks.shapes, lambda name: torch.from_numpy(masks.read(name))
    return {name: tuple(mask.shape) for name, mask in masks.items()}, lambda name: masks[name].bool()


def _linear(modules: dict[str, torch.nn.Module], prefix: str, name: str, shape: tuple[int, ...]) -> torch.nn.Linear:
    path = name.removesuffix(".weight")
    paths = [path, path.removeprefix(prefix), prefix + path]
    # Of a Gemma 3 with a vision tower transformers saves other names than its modules have.
    saved = "language_model.model."
    if path.startswith(saved):
        paths += [f"{start}language_model.{path.removeprefix(saved)}" for start in (prefix, "")]
    module = next((modules[p] for p in paths if p in modules), None)
    if module is None or not name.endswith(".weight"):
        raise BarberError(f"the model has no weight {name}; give the masks that were written for this model")
    if not isinstance(module, torch.nn.Linear):
        raise BarberError(f"{name} belongs to a {type(module).__name__}; only the weights of nn.Linear can be masked")
    in_model = (module.out_features, module.in_features)
    if in_model != shape:
        raise BarberError(f"{name} is {in_model} in the model, {shape} in the masks; give the masks of this model")
    return module
