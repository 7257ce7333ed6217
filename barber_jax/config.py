"""Options of a pruning run: the groups that lie beside the code they are for, put together and checked against each
other."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from barber_jax.console.command import parse_groups
from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.convert.formats import Format
from barber_jax.criteria import CRITERIA
from barber_jax.criteria.allocation import AllocationOptions
from barber_jax.criteria.starting import StartOptions
from barber_jax.data.calibration import CalibrationOptions
from barber_jax.devices.options import DeviceOptions
from barber_jax.forward.perplexity import EvaluationOptions
from barber_jax.masks.pattern import PatternOptions
from barber_jax.stages import unused_options, validates
from barber_jax.stages.base import SharedOptions
from barber_jax.stages.rebuild import RebuildOptions
from barber_jax.stages.reconstruct import ReconstructOptions
from barber_jax.stages.refine import RefineOptions
from barber_jax.stages.table import enabled_stages, needs_dense_stream

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "mask": {"rebuild": False, "token_weighting": "norm", "refine": 30},
    "best": {"rebuild": False, "token_weighting": "norm", "refine": 10, "reconstruct": 200},
}
"""Preset -> the defaults that it changes."""
NOT_REPEATED = ("overwrite", "resume", "verbose", "compilation_cache", "coordinator", "processes", "process")
"""Options of one machine or one attempt, not of the result."""


@dataclass(frozen=True, kw_only=True)
class PresetOptions(OptionGroup):
    """A recipe: defaults for the options below, any of which wins over it."""

    preset: Literal[*PRESETS] = "paper"
    """A recipe: paper = LLM-Barber as published, mask = the best mask, best = mask and trained weights."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(OptionGroup):
    """The checkpoint to prune."""

    ckpt: str
    """Checkpoint: a folder (safetensors, PyTorch .bin or Orbax), a Hub id, or a .gguf file."""

    def settle(self) -> None:
        if not self.ckpt:
            # As a path it would mean the current folder.
            raise BarberError("--ckpt is empty; name what to read")


# A dataclass has the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class InputOptions(CalibrationOptions, CheckpointOptions):
    """What is read."""

    def settle(self) -> None:
        CheckpointOptions.settle(self)
        CalibrationOptions.settle(self)


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(AllocationOptions, PatternOptions):
    """How much is pruned, and where."""

    def settle(self) -> None:
        PatternOptions.settle(self)
        AllocationOptions.settle(self)


@dataclass(frozen=True, kw_only=True)
class BeyondOptions(SharedOptions, ReconstructOptions, RefineOptions):
    """Stages that the paper does not have: better masks, trained weights."""

    def settle(self) -> None:
        for group in (RefineOptions, ReconstructOptions, SharedOptions):
            group.settle(self)


@dataclass(frozen=True, kw_only=True)
class FileOptions(OptionGroup):
    """What is written."""

    out: Path
    """Folder to write: checkpoint, masks.safetensors, run.json, report.html, README.md."""
    format: Format = "hf"
    """hf = safetensors, orbax = Flax parameter tree and masks, or both."""
    save_start: bool = False
    """Also write start_masks.safetensors, the masks before any stage; a study compares swaps by it."""
    overwrite: bool = False
    """Replace --out, or an unfinished run for it."""
    resume: bool = False
    """Continue the unfinished run for this --out."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """A line for every sub-block."""


@dataclass(frozen=True, kw_only=True, init=False)
class PruneConfig(
    PresetOptions,
    InputOptions,
    SparsityOptions,
    StartOptions,
    RebuildOptions,
    BeyondOptions,
    DeviceOptions,
    EvaluationOptions,
    FileOptions,
):
    """Prune a Hugging Face checkpoint and rebuild its mask (LLM-Barber, arXiv 2408.10631).

    Args:
        options: by name, as on the command line with `_` for `-`. What is left out has the preset's default.

    Raises:
        BarberError: an option is missing, unknown, or has a value that cannot be used.
    """

    GROUPS: ClassVar[Mapping[str, type[OptionGroup]]] = {
        "preset": PresetOptions,
        "input": InputOptions,
        "pattern": SparsityOptions,
        "start": StartOptions,
        "rebuild": RebuildOptions,
        "beyond_the_paper": BeyondOptions,
        "devices": DeviceOptions,
        "evaluation": EvaluationOptions,
        "files": FileOptions,
    }
    """Heading of `--help` -> its options."""

    def __init__(self, **options: Any):
        fields = dataclasses.fields(self)
        known = {field.name for field in fields}
        for name in options:
            if name not in known:
                raise BarberError(f"{flag(name)} is not an option of {type(self).__name__}")
        preset = options.get("preset", "paper")
        if preset not in PRESETS:
            raise BarberError(f"--preset {preset} is unknown; known are {', '.join(PRESETS)}")
        options = {**PRESETS[preset], **options}
        for field in fields:
            value = options.get(field.name, field.default)
            if value is dataclasses.MISSING:
                raise BarberError(f"missing {flag(field.name)}")
            self._set(field.name, value)
        self.settle()

    @classmethod
    def parse(cls, program: str, arguments: list[str] | None = None) -> "PruneConfig":
        """From the command line (None: sys.argv) of `python -m program`.

        Raises:
            BarberError: an option is missing, unknown, or has a value that cannot be used.
            SystemExit: after --help.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        # The preset decides the defaults that everything else is parsed, and shown by --help, with.
        return cls(**parse_groups(cls, cls.GROUPS, program, arguments, PRESETS.get(_preset(arguments), {})))

    def settle(self) -> None:
        """Settle every group, then what depends on several of them."""
        for group in self.GROUPS.values():
            group.settle(self)
        self._settle_start()
        self._settle_rebuild()
        if self.allocate == "owl":
            self._check_owl()
        self._refuse_unused()
        if self.validates and self.samples < 2:
            raise BarberError("--samples 1: --alpha auto, --refine and --reconstruct hold samples out; use at least 2")

    def _settle_start(self) -> None:
        given = "--masks" if self.masks else "--sparse-ckpt"
        if self.method is None and self.sparsity is not None:
            raise BarberError(f"--sparsity {self.sparsity:g} conflicts with {given}, which fixes the sparsity")
        if self.retain_reconstruction and not (self.method == "sparsegpt" or self.sparse_ckpt):
            raise BarberError("--retain-reconstruction needs updated weights: --method sparsegpt or --sparse-ckpt")

    def _settle_rebuild(self) -> None:
        """Granularity and alpha follow the criterion, as published; given masks have wanda's."""
        published = CRITERIA[self.method or "wanda"]
        structured = self.sparsity_pattern.structured
        if self.granularity is None:
            # N:M groups lie within an output, so another published default does not apply there.
            self._set("granularity", "output1" if structured else published.granularity)
        if self.alpha is None:
            self._set("alpha", published.alpha)
        if self.rebuild and structured and self.granularity != "output1":
            raise BarberError(
                f"--granularity {self.granularity}: N:M patterns are rebuilt within an output; use output1"
            )

    def _check_owl(self) -> None:
        if self.method is None:
            given = "--masks" if self.masks else "--sparse-ckpt"
            raise BarberError(f"--allocate owl conflicts with {given}, which fixes every block's sparsity")
        if self.sparsity_pattern.structured:
            pattern = self.sparsity_pattern
            raise BarberError(f"--allocate owl conflicts with --pattern {pattern}, which fixes every block's sparsity")

    def _refuse_unused(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for option, needs in unused_options(self).items():
            value = getattr(self, option)
            # A fixed alpha is there even where none was asked for: the published one.
            asked = value == "auto" if option == "alpha" else value != defaults[option]
            if asked:
                raise BarberError(f"{flag(option)} {value} needs {needs}")

    def as_dict(self) -> dict[str, Any]:
        """Every option by name, with the pattern and the sparsity that they give together."""
        pattern = self.sparsity_pattern
        return {**dataclasses.asdict(self), "pattern": str(pattern), "sparsity": pattern.sparsity}

    def command_line(self) -> list[str]:
        """The command-line options that give this configuration again, without those of a single machine or run."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | PRESETS[self.preset]
        line = []
        for option, value in dataclasses.asdict(self).items():
            if option in NOT_REPEATED or value == defaults[option]:
                continue
            if isinstance(value, bool):
                line.append(flag(option) if value else flag(f"no_{option}"))
            else:
                line += [flag(option), str(value)]
        return line

    @property
    def runs_stages(self) -> bool:
        """Whether anything is done after the starting masks."""
        return bool(enabled_stages(self))

    @property
    def validates(self) -> bool:
        """Whether something is chosen by its loss on held-out samples."""
        return validates(self)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations are needed beside the pruned model's."""
        return needs_dense_stream(self)


def _preset(arguments: list[str]) -> str | None:
    """The value of the last --preset."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == "--preset":
            found = following
        elif word.startswith("--preset="):
            found = word.partition("=")[2]
    return found
