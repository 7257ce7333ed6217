"""Options of a pruning run: combines the groups of options, checks them against each other and applies presets."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from barber_jax.console.command import parse_groups
from barber_jax.console.configuration import Configuration
from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.console.values import check_values
from barber_jax.convert.formats import Format
from barber_jax.criteria import CRITERIA
from barber_jax.criteria.allocation import AllocationOptions
from barber_jax.criteria.gblm import GblmOptions
from barber_jax.criteria.starting import StartOptions
from barber_jax.data.calibration import CalibrationOptions
from barber_jax.devices.options import PROCESS_OPTIONS, DeviceOptions
from barber_jax.forward.perplexity import EvaluationOptions
from barber_jax.masks.pattern import PatternOptions, SparsityPattern
from barber_jax.stages import unused_options, validates
from barber_jax.stages.base import SharedOptions
from barber_jax.stages.least_squares import LeastSquaresOptions
from barber_jax.stages.rebuild import RebuildOptions
from barber_jax.stages.reconstruct import ReconstructOptions
from barber_jax.stages.refine import RefineOptions
from barber_jax.stages.table import enabled_stages, needs_dense_stream, needs_token_weights

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "mask": {"rebuild": False, "token_weighting": "norm", "refine": 30},
    "best": {"rebuild": False, "token_weighting": "norm", "refine": 10, "reconstruct": 200},
}
"""Preset -> defaults that it changes."""
NOT_REPRODUCED = ("out", "overwrite", "resume", "verbose", "selection", "compilation_cache", *PROCESS_OPTIONS)
"""Options that concern one machine or one attempt; left out of the command line that reproduces a result."""


@dataclass(frozen=True, kw_only=True)
class PresetOptions(OptionGroup):
    """A preset: defaults for the options below. An option that is given overrides the preset."""

    preset: Literal[*PRESETS] = "paper"
    """Defaults: paper = LLM-Barber as published, mask = the best mask, best = the best mask and trained weights."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(OptionGroup):
    """The checkpoint to prune."""

    ckpt: str
    """Checkpoint: a folder (safetensors, PyTorch .bin or Orbax), a Hub id, or a .gguf file."""

    def settle(self) -> None:
        if not self.ckpt:
            # Path("") is the current folder.
            raise BarberError("--ckpt is empty; give a checkpoint")


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class InputOptions(CalibrationOptions, CheckpointOptions):
    """Checkpoint and calibration data."""

    def settle(self) -> None:
        self._settle_bases(InputOptions)


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(AllocationOptions, PatternOptions):
    """Sparsity, its pattern and its allocation to blocks."""

    def settle(self) -> None:
        self._settle_bases(SparsityOptions)


@dataclass(frozen=True, kw_only=True)
class StartingMaskOptions(GblmOptions, StartOptions):
    """Source of the starting masks."""

    def settle(self) -> None:
        self._settle_bases(StartingMaskOptions)


@dataclass(frozen=True, kw_only=True)
class BeyondOptions(SharedOptions, ReconstructOptions, LeastSquaresOptions, RefineOptions):
    """Stages beyond the paper: mask refinement and weight reconstruction."""

    def settle(self) -> None:
        self._settle_bases(BeyondOptions)


@dataclass(frozen=True, kw_only=True)
class FileOptions(OptionGroup):
    """Output files."""

    out: Path
    """Output folder, for the checkpoint, masks.safetensors, run.json, report.html and README.md."""
    format: Format = "hf"
    """hf = safetensors, orbax = Flax parameter tree and masks, or both."""
    save_start: bool = False
    """Also write start_masks.safetensors, the masks before the first stage, from which a study counts swaps."""
    overwrite: bool = False
    """Replace an existing --out, or the unfinished run for it."""
    resume: bool = False
    """Continue the unfinished run for this --out."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Print a line for every sub-block."""

    def settle(self) -> None:
        if self.out is not None:
            self._set("out", Path(self.out))


@dataclass(frozen=True, kw_only=True, init=False)
class PruneConfig(
    PresetOptions,
    InputOptions,
    SparsityOptions,
    StartingMaskOptions,
    RebuildOptions,
    BeyondOptions,
    DeviceOptions,
    EvaluationOptions,
    FileOptions,
    Configuration,
):
    """Prune a Hugging Face checkpoint and rebuild its mask (LLM-Barber, arXiv 2408.10631).

    Args:
        options: by name, as on the command line with `_` for `-`. An option left out gets the preset's default.

    Raises:
        BarberError: an option is missing or unknown, or has an invalid value.
    """

    GROUPS: ClassVar[Mapping[str, type[OptionGroup]]] = {
        "preset": PresetOptions,
        "input": InputOptions,
        "pattern": SparsityOptions,
        "start": StartingMaskOptions,
        "rebuild": RebuildOptions,
        "beyond_the_paper": BeyondOptions,
        "devices": DeviceOptions,
        "evaluation": EvaluationOptions,
        "files": FileOptions,
    }
    """Heading in `--help` -> group of options."""

    def __init__(self, **options: Any):
        preset = options.get("preset", "paper")
        if preset not in PRESETS:
            raise BarberError(f"--preset {preset} is unknown; known are {', '.join(PRESETS)}")
        self._fill({**PRESETS[preset], **options})

    @classmethod
    def parse(cls, program: str, arguments: list[str] | None = None) -> "PruneConfig":
        """Parse the command line of `python -m program`; `arguments` default to sys.argv.

        Raises:
            BarberError: an option is missing or unknown, or has an invalid value.
            SystemExit: after --help.
        """
        arguments = sys.argv[1:] if arguments is None else arguments
        # The preset is needed first: it determines the defaults for parsing and for --help.
        return cls(**parse_groups(cls, cls.GROUPS, program, arguments, PRESETS.get(_preset(arguments), {})))

    def settle(self) -> None:
        """Settle every group, then options that depend on several groups."""
        check_values({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        for group in self.GROUPS.values():
            group.settle(self)
        self._settle_start()
        self._settle_rebuild()
        if self.allocate != "uniform":
            self._check_allocation()
        self._refuse_unused()
        if self.validates and self.samples < 2:
            raise BarberError(
                "--samples 1: samples are held out for --alpha auto and the stages beyond the paper; use at least 2"
            )

    def _settle_start(self) -> None:
        given = "--masks" if self.masks else "--sparse-ckpt"
        if self.method is None and self.sparsity is not None:
            raise BarberError(f"--sparsity {self.sparsity:g} conflicts with {given}, which fixes the sparsity")
        updated = self.sparse_ckpt or (self.method and CRITERIA[self.method].updates_weights)
        if self.retain_reconstruction and not updated:
            raise BarberError(
                "--retain-reconstruction needs updated weights: --method sparsegpt, alps, or --sparse-ckpt"
            )

    def _settle_rebuild(self) -> None:
        """Set granularity and alpha to the criterion's published defaults, or to wanda's if masks are given."""
        published = CRITERIA[self.method or "wanda"]
        structured = self.sparsity_pattern.structured
        if self.granularity is None:
            # N:M groups are within an output, so no other granularity is possible.
            self._set("granularity", "output1" if structured else published.granularity)
        if self.alpha is None:
            self._set("alpha", published.alpha)
        if self.rebuild and structured and self.granularity != "output1":
            raise BarberError(
                f"--granularity {self.granularity}: N:M patterns are rebuilt within an output; use output1"
            )

    def _check_allocation(self) -> None:
        if self.method is None:
            given = "--masks" if self.masks else "--sparse-ckpt"
            raise BarberError(f"--allocate {self.allocate} conflicts with {given}, which fixes every block's sparsity")
        if self.sparsity_pattern.structured:
            pattern = self.sparsity_pattern
            raise BarberError(
                f"--allocate {self.allocate} conflicts with --pattern {pattern}, which fixes every block's sparsity"
            )

    def _refuse_unused(self) -> None:
        """Raise `BarberError` for an option that was given but that no enabled stage uses."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for option, needs in unused_options(self).items():
            value = getattr(self, option)
            # A number for alpha may be the published default, which is filled in even if not given.
            given = value == "auto" if option == "alpha" else value != defaults[option]
            if given:
                raise BarberError(f"{flag(option)} {value} needs {needs}")

    def as_dict(self) -> dict[str, Any]:
        """All options by name, with the pattern and the sparsity that take effect."""
        pattern = self.sparsity_pattern
        return {**dataclasses.asdict(self), "pattern": str(pattern), "sparsity": pattern.sparsity}

    def command_line(self) -> list[str]:
        """Options that give this configuration again on the command line, without --out and those of one machine."""
        values, pattern = dataclasses.asdict(self), self.pattern or "unstructured"
        # The same result has the same command line, whether or not a default was spelled out.
        if self.sparsity == SparsityPattern.parse(pattern, None).sparsity:
            values["sparsity"] = None
        if pattern == "unstructured" and not self.masks:
            values["pattern"] = None
        # What no enabled stage looks at was filled in, not given.
        left_out = {*NOT_REPRODUCED, *unused_options(self)}
        return self._changed_words({"ckpt": values.pop("ckpt"), **values}, PRESETS[self.preset], left_out)

    @property
    def runs_stages(self) -> bool:
        """Whether any stage runs after the starting masks."""
        return bool(enabled_stages(self))

    @property
    def validates(self) -> bool:
        """Whether a stage uses the loss on held-out samples to make a choice."""
        return validates(self)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether a stage needs the activations of the dense model besides the pruned model's."""
        return needs_dense_stream(self)

    @property
    def needs_token_weights(self) -> bool:
        """Whether a stage weights tokens by the dense model's end loss."""
        return needs_token_weights(self)


def recorded_command(options: Mapping[str, Any]) -> list[str] | None:
    """Command line, as from `PruneConfig.command_line`, of the run whose options run.json has.

    None where this version cannot give those options.
    """
    known = {field.name for field in dataclasses.fields(PruneConfig)}
    given = {name: value for name, value in options.items() if name in known}
    if given.get("masks") or given.get("sparse_ckpt"):
        # Recorded is the sparsity of the given masks, which is no option beside them.
        given["sparsity"] = None
    try:
        return PruneConfig(**given).command_line()
    except (BarberError, TypeError, ValueError):
        return None


def _preset(arguments: list[str]) -> str | None:
    """Value of the last --preset on the command line, or None."""
    found = None
    for word, following in itertools.pairwise([*arguments, None]):
        if word == "--preset":
            found = following
        elif word.startswith("--preset="):
            found = word.partition("=")[2]
    return found
