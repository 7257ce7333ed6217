"""Groups of options of `python -m barber_jax.recover`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.options import OptionGroup
from barber_jax.devices.options import ComputeOptions
from barber_jax.forward.perplexity import EvaluationOptions
from barber_jax.masks.mask_file import FILE_NAME
from barber_jax.recovery.training import Scope

DEFAULT_RANK = 16
"""Rank of low-rank factors, unless --rank is given."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """The pruned checkpoint, its masks and its teacher."""

    ckpt: str
    """Pruned checkpoint: a folder (safetensors, PyTorch .bin or Orbax), a Hub id, or a .gguf file."""
    teacher: str | None = None
    """Dense checkpoint whose next-token distribution is learned. Default: none, next-token cross-entropy alone."""
    masks: Path | None = None
    """Mask file (masks.safetensors, or its folder). Default: the one in --ckpt, else its zeros."""

    def settle(self) -> None:
        if not self.ckpt:
            raise BarberError("--ckpt is empty; give a pruned checkpoint")
        if self.teacher == "":
            raise BarberError("--teacher is empty; give a checkpoint or leave it out")
        if self.masks is not None:
            folder = expand(self.masks).is_dir()
            self._set("masks", Path(self.masks) / FILE_NAME if folder else Path(self.masks))


@dataclass(frozen=True, kw_only=True)
class TextOptions(OptionGroup):
    """Text to train on."""

    text: str
    """c4, wikitext2, ptb, a text file or folder, .npy token ids, or self (written by the teacher)."""
    text_field: str = "text"
    """Name of the text column, in files with columns."""
    length: int = 512
    """Tokens in each window of text."""
    held_out: int = 16
    """Windows of the text that are not trained on: their loss chooses the weights that are written."""
    seed: int = 0
    """Seed of the held-out windows, of the order of the others, and of --scope lora's start."""

    def settle(self) -> None:
        if not self.text:
            raise BarberError("--text is empty; name a dataset or a file")
        self._require_least(1, "held_out")
        self._require_least(0, "seed")
        self._require_least(2, "length")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptionGroup):
    """Training."""

    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps; more than the text has means several passes over it."""
    steps: int | None = None
    """Steps to train for, instead of --tokens. Default: one pass over the text."""
    batch: int = 16
    """Windows in each step."""
    micro_batch: int | None = None
    """Windows computed at a time; divides --batch and determines peak memory. Default: by --length and device."""
    rate: float = 0.002
    """Peak learning rate, as a fraction of the root mean square of a matrix's surviving weights."""
    warm_up: float = 0.05
    """Fraction of the steps for linear warm-up; then the rate falls to 0 as a cosine."""
    mix: float = 0.0
    """Share of next-token cross-entropy in the loss; the rest is the divergence from the teacher. Without one: all."""
    clip: float = 1.0
    """Threshold of gradient clipping, by the norm of all gradients together."""
    scope: Scope = "weights"
    """What is trained: surviving weights, all (norms, biases and embeddings too), lora (low-rank factors)."""
    rank: int | None = None
    """Rank of the factors of --scope lora. Default 16."""
    remat: Literal["auto", "all", "light", "none"] = "auto"
    """What of a block is recomputed in the backward pass: all = least memory, light = all but matrix products, none."""

    def settle(self) -> None:
        self._require_least(1, "tokens", "steps", "batch", "micro_batch", "rank")
        if self.tokens and self.steps:
            raise BarberError("--tokens and --steps: give one of them")
        for option in ("warm_up", "mix"):
            value = getattr(self, option)
            if not 0 <= value <= 1:
                raise BarberError(f"--{option.replace('_', '-')} {value:g} must be between 0 and 1")
        for option in ("rate", "clip"):
            value = getattr(self, option)
            if not 0 < value < float("inf"):
                raise BarberError(f"--{option} {value:g} must be a number above 0")
        if self.micro_batch and self.batch % self.micro_batch:
            raise BarberError(f"--micro-batch {self.micro_batch} does not divide --batch {self.batch}")
        if self.scope != "lora" and self.rank is not None:
            raise BarberError(f"--rank {self.rank} needs --scope lora")
        if self.scope == "lora" and self.rank is None:
            self._set("rank", DEFAULT_RANK)


@dataclass(frozen=True, kw_only=True)
class RecoverDeviceOptions(ComputeOptions):
    """Devices, processes and precision."""

    mesh: str | None = None
    """data=N,model=M: shard parameters, moments and windows over all N x M devices. Default: one device."""

    def settle(self) -> None:
        ComputeOptions.settle(self)


@dataclass(frozen=True, kw_only=True)
class RecoverEvaluationOptions(EvaluationOptions):
    """Evaluation along the way, and of the teacher, the pruned and the recovered model."""

    eval_text: Path | None = None
    """Measure the perplexity of the teacher, the pruned and the recovered model on this text file."""
    eval_dataset: Literal["wikitext2", "ptb", "c4"] | None = None
    """Measure the perplexity of the teacher, the pruned and the recovered model on this dataset."""
    eval_every: int | None = None
    """Steps between two measurements of the held-out loss, each with a checkpoint. Default: a twentieth of all."""

    def settle(self) -> None:
        EvaluationOptions.settle(self)
        self._require_least(1, "eval_every")


@dataclass(frozen=True, kw_only=True)
class RecoverFileOptions(OptionGroup):
    """Output files."""

    out: Path
    """Output folder, for the checkpoint, masks.safetensors, recover.json, report.html and README.md."""
    keep: Literal["best", "last"] = "best"
    """Which weights are written: those of the least held-out loss, or the last."""
    log_dir: Path | None = None
    """Folder for TensorBoard events."""
    overwrite: bool = False
    """Replace an existing --out, or the unfinished run for it."""
    resume: bool = False
    """Continue the unfinished run for this --out."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Print a line for every step."""

    def settle(self) -> None:
        if self.out is not None:
            self._set("out", Path(self.out))
        if self.log_dir is not None:
            self._set("log_dir", Path(self.log_dir))
