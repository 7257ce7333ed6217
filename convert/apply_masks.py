"""python -m barber_jax.convert.apply_masks: apply a mask file to a model in PyTorch. JAX is not imported."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from barber_jax.console import causes
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.extras import needs
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import check_name, new_folder, require_unmounted
from barber_jax.console.quiet import held_output
from barber_jax.convert.tokenizer_files import save_tokenizer
from barber_jax.convert.torch_model import load_model
from barber_jax.masks.mask_file import read_masks

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class ApplyConfig:
    """Apply a mask file to a Hugging Face model in PyTorch, check it, and print the sparsity of every matrix.

    Exit status: 0 when all pruned weights are zero, 1 when --check-only finds some that are not, 2 for an error.
    """

    model: str
    """Folder or Hub id of the model, pruned or dense."""
    masks: Path
    """The masks.safetensors file."""
    out: Path | None = None
    """Save the masked model into this new or empty folder. Without it nothing is written."""
    check_only: bool = False
    """Only compare the model with the masks; do not apply them."""


def apply(config: ApplyConfig) -> None:
    """Check a model against the masks; unless --check-only is set, apply them and save the model to --out, if given.

    Raises:
        BarberError: the options, the mask file or the model cannot be used, or PyTorch is not installed.
        SystemExit: status 1, where --check-only finds pruned weights that are not zero.
    """
    out = config.out
    if config.check_only and out:
        raise BarberError("--check-only saves nothing; leave out --out or --check-only")
    if out:
        check_name(out, [Path(config.model), config.masks])
    with output_lock(out) if out else contextlib.nullcontext():
        _apply(config)


def _apply(config: ApplyConfig) -> None:
    """Do what `apply` does, with --out locked."""
    out = config.out
    if out and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BarberError(f"--out {out} exists and is not an empty folder; give another folder")
    if out:
        require_unmounted(out)
    masks = read_masks(config.masks)
    with needs("torch"):
        from barber_jax.convert import torch_masks
    # It computes nothing, so every model can have the plainest attention.
    model = load_model(config.model, "--model", "eager", dtype="auto")
    report = torch_masks.check_masks(model, masks)
    if not report.ok and not config.check_only:
        where = "" if out else " (in memory only: --out DIR saves the model)"
        print(f"{report.total.violations} pruned weights were not zero and have been set to zero{where}")
        torch_masks.apply_masks(model, masks, "in_place")
        report = torch_masks.check_masks(model, masks)
    print(report.table())
    if not report.ok:
        raise SystemExit(1)
    if out:
        _require_finite(config.model, model)
        _save(config.model, model, out)


def _require_finite(spec: str, model: "transformers.PreTrainedModel") -> None:
    """Raise BarberError if a tensor holds NaN or Inf, as when the dtype in config.json is narrower than the file's."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise BarberError(
                f"--model {spec}: tensor {name} holds NaN or Inf as {dtype}, the dtype in its config.json; "
                "no model is saved; set the dtype there to that of the weights, or fetch the model again"
            )


def _save(spec: str, model: "transformers.PreTrainedModel", out: Path) -> None:
    with new_folder(out) as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:  # safetensors raises its own type, not OSError, for disk errors
            raise BarberError(f"--out {out}: cannot save the model: {error}") from error
        _save_tokenizer(spec, folder, out)


def _save_tokenizer(spec: str, folder: Path, out: Path) -> None:
    import transformers

    try:
        with held_output():
            save_tokenizer(transformers.AutoTokenizer.from_pretrained(spec, trust_remote_code=False), folder)
    except BaseException as error:
        if not causes.is_foreign(error):
            raise
        print(f"{spec} has no tokenizer that transformers can load; only the model was saved to {out}")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line (None: sys.argv)."""
    apply(parse(ApplyConfig, "barber_jax.convert.apply_masks", arguments))


if __name__ == "__main__":
    exit_with_one_line(run)
