"""What a pruning run is asked to do: frozen dataclasses that validate themselves."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from barber_jax.console.errors import BarberError
from barber_jax.convert.formats import Format

Method = Literal["magnitude", "wanda", "sparsegpt"]
Allocation = Literal["uniform", "owl"]
Granularity = Literal["block", "layer", "output1", "input1"]
Metric = Literal["wd", "w", "d"]
ComputeDtype = Literal["float32", "bfloat16"]
TokenWeighting = Literal["none", "norm"]
Target = Literal["same", "dense"]
Trained = Literal["weights", "all"]

PUBLISHED: dict[str, tuple[Granularity, float]] = {
    "magnitude": ("block", 0.1),
    "wanda": ("output1", 0.01),
    "sparsegpt": ("layer", 0.1),
}
"""Starting criterion -> granularity and alpha as published (arXiv 2408.10631, table of settings)."""
MOST = 2**31 - 1
"""Swaps and steps are counted in int32."""
OWL_LAMBDA, OWL_M = 0.08, 5.0
"""As published for LLaMA (arXiv 2310.05175)."""


@dataclass(frozen=True)
class SparsityPattern:
    """Where zeros may lie: anywhere (`unstructured`), or `keep` kept in each group of `of` consecutive inputs.

    Attributes:
        sparsity: fraction of weights pruned, in [0, 1).
        keep, of: N and M of an N:M pattern; 0 for unstructured.
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, pattern: str, sparsity: float | None) -> "SparsityPattern":
        """From the command line's `--pattern` and `--sparsity` (None: not given).

        Raises:
            BarberError: an unknown pattern, N > M, a sparsity outside [0, 1) or in conflict with N:M.
        """
        if sparsity is not None and not 0 <= sparsity < 1:  # NaN fails this too
            raise BarberError(f"--sparsity {sparsity:g} is outside [0, 1)")
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", pattern)
        if not found:
            raise BarberError(f"--pattern {pattern!r} is neither 'unstructured' nor N:M such as 2:4")
        keep, of = int(found[1]), int(found[2])
        if not 1 <= keep <= of:
            raise BarberError(f"--pattern {pattern}: keeping N of every M inputs needs 1 <= N <= M")
        implied = 1 - keep / of
        if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-6):
            raise BarberError(f"--sparsity {sparsity:g} conflicts with --pattern {pattern}, which means {implied:g}")
        return cls(implied, keep, of)

    @property
    def structured(self) -> bool:
        """Whether it is N:M."""
        return self.of > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.structured else "unstructured"

    def check_inputs(self, inputs: int, name: str) -> None:
        """Raise BarberError unless the groups of M fit a linear with that many inputs."""
        if self.structured and inputs % self.of:
            raise BarberError(f"--pattern {self}: {self.of} does not divide the {inputs} inputs of {name}")


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """`data=N,model=M`, either of them left out for 1 -> (N, M).

    Raises:
        BarberError: not of that form.
    """
    if text is None:
        return None
    parts = [re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if len(sizes) != len(parts):
        raise BarberError(f"--mesh {text!r} is not of the form data=N,model=M, such as data=4,model=2")
    return sizes.get("data", 1), sizes.get("model", 1)


def idle_options(rebuild: bool, auto: bool, refine: bool, reconstruct: bool) -> dict[str, str]:
    """Options that no stage looks at, each with what would.

    Args:
        rebuild, refine, reconstruct: whether the stage is on. auto: whether alpha is `auto`.
    """
    rebuilding = "a rebuild; leave out --no-rebuild"
    looks = {
        "alpha": (rebuild, rebuilding),
        "metric": (rebuild, rebuilding),
        "reconstruct_rate": (reconstruct, "--reconstruct"),
        "reconstruct_batch": (reconstruct, "--reconstruct"),
        "reconstruct_scope": (reconstruct, "--reconstruct"),
        "target": ((rebuild and auto) or refine or reconstruct, "--alpha auto, --refine or --reconstruct"),
        "rounds": (rebuild or refine or reconstruct, "a rebuild, --refine or --reconstruct"),
    }
    return {option: needs for option, (looked_at, needs) in looks.items() if not looked_at}


@dataclass(frozen=True)
class PruneConfig:
    """Prune a Hugging Face checkpoint and rebuild its mask (LLM-Barber, arXiv 2408.10631)."""

    ckpt: str
    """Checkpoint to prune: a folder (safetensors, PyTorch .bin or Orbax), a Hub id, or a .gguf file."""
    out: Path
    """Folder to write: the pruned checkpoint, masks.safetensors and run.json."""
    format: Format = "hf"
    """What the pruned checkpoint is written as: hf (safetensors), orbax (Flax parameter tree and masks), or both."""
    method: Method | None = None
    """Criterion that gives the starting mask. Default wanda, unless --masks or --sparse-ckpt gives it."""
    masks: Path | None = None
    """Start from this mask file (masks.safetensors) instead of a criterion."""
    sparse_ckpt: str | None = None
    """Start from the zeros and the weights of this pruned checkpoint of the same model instead of a criterion. With
    --masks too, from its weights and those masks: a weight that is zero by chance then counts as kept."""
    sparsity: float | None = None
    """Fraction of weights to prune, in [0, 1). Default 0.5, or what an N:M pattern means."""
    pattern: str | None = None
    """'unstructured', or N:M to keep N of every M consecutive inputs, such as 2:4. Default: that of --masks, else
    unstructured."""
    allocate: Allocation = "uniform"
    """How sparsity is spread over blocks: uniform, or owl = less where the dense model has more outliers, about
    --sparsity +- --owl-lambda. Costs one forward of the dense model."""
    owl_lambda: float | None = None
    """How far from --sparsity a block's may lie, about, with --allocate owl. Default 0.08."""
    owl_m: float | None = None
    """How many times the mean of its block a weight's score must be to count as an outlier, with --allocate owl.
    Default 5."""
    rebuild: bool = True
    """Rebuild the starting mask; without it the starting mask is the result."""
    granularity: Granularity | None = None
    """Group in which weights compete during the rebuild. Default as published: wanda (and given masks) output1,
    magnitude block, sparsegpt layer."""
    alpha: float | Literal["auto"] | None = None
    """Fraction of the mask outliers to swap, in [0, 1], or 'auto': for each sub-block what lowers its loss on samples
    held apart most (pays from poor masks such as magnitude's, not from wanda's). Default as published: wanda (and given
    masks) 0.01, magnitude and sparsegpt 0.1."""
    metric: Metric = "wd"
    """Rebuild score: wd = |weight| x gradient (the paper's), w = |weight|, d = gradient."""
    retain_reconstruction: bool = False
    """Keep the starting weights that sparsegpt (or --sparse-ckpt) updated through the rebuild, instead of going back to
    the dense ones."""
    token_weighting: TokenWeighting = "none"
    """How tokens count in the reconstruction loss: none = alike (the paper's), norm = divided by what the next norm
    divides the token by, so that a few tokens with massive activations do not rule it."""
    refine: int = 0
    """At most so many swaps in every output by their exact gain in layer-wise error, after the rebuild; 0 = none."""
    reconstruct: int = 0
    """Train the weights that survive in each sub-block for so many steps to give --target; 0 = none."""
    target: Target = "dense"
    """What --alpha auto, --refine and --reconstruct choose by, train towards and report losses of: dense = the
    residual stream of the dense model, same = the dense sub-block's output on the pruned model's inputs."""
    reconstruct_rate: float = 0.01
    """Learning rate of reconstruction, as a fraction of the root mean square of each matrix's surviving weights."""
    reconstruct_batch: int = 1
    """Samples in a step of reconstruction."""
    reconstruct_scope: Trained = "weights"
    """What reconstruction trains: weights = the surviving weights, all = the sub-block's biases and norms too."""
    rounds: int = 1
    """How often rebuild, refinement and reconstruction of a sub-block alternate."""
    calibration: str = "c4"
    """c4, wikitext2, ptb, a .txt/.jsonl/.parquet/.arrow file, a saved dataset folder, or .npy token ids."""
    text_field: str = "text"
    """Column that holds the text, for calibration and evaluation files with columns."""
    samples: int = 128
    """Calibration samples."""
    length: int = 2048
    """Tokens in each calibration sample."""
    seed: int = 0
    """Seed of the calibration sampling."""
    batch: int | None = None
    """Calibration samples in a micro-batch: sets peak memory, changes no mask but by rounding. Default: 8; on CPU as
    many as make about 1024 tokens, which stay in its caches."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products; statistics are float32 whatever it is."""
    mesh: str | None = None
    """Devices: data=N,model=M spreads samples over N and linears over M (N x M devices). Default: one device; with
    many processes all devices as data."""
    offload_activations: bool = False
    """Keep the activations of all samples in host memory; a micro-batch at a time is on the device."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs for later runs, or 'off'. Default: JAX_COMPILATION_CACHE_DIR, else
    barber_jax in the user's cache folder."""
    coordinator: str | None = None
    """host:port of process 0, where several processes compute together and no cluster tells JAX of them."""
    processes: int | None = None
    """How many processes there are (with --coordinator)."""
    process: int | None = None
    """Which one this is, from 0 (with --coordinator)."""
    overwrite: bool = False
    """Replace --out, or an unfinished run for it, if it exists."""
    resume: bool = False
    """Go on with the unfinished run for this --out."""
    save_start: bool = False
    """Also write start_masks.safetensors, the masks before the rebuild; a study compares swaps by it."""
    eval_text: Path | None = None
    """After pruning, measure the result's perplexity on this text file (into run.json)."""
    eval_dataset: Literal["wikitext2", "ptb", "c4"] | None = None
    """After pruning, measure the result's perplexity on this dataset (into run.json)."""
    eval_windows: int | None = None
    """How many windows of --length tokens to evaluate. Default: all."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """More detail: a line for every sub-block."""

    def __post_init__(self):
        for option in ("ckpt", "calibration"):
            if not getattr(self, option):
                # As a path it would mean the current folder.
                raise BarberError(f"--{option} is empty; name what to read")
        self._settle_start()
        granularity, alpha = PUBLISHED[self.method or "wanda"]
        if self.granularity is None:
            # N:M keeps its groups inside an output, so another published default does not apply there.
            object.__setattr__(self, "granularity", "output1" if self.sparsity_pattern.structured else granularity)
        if self.alpha is None:
            object.__setattr__(self, "alpha", alpha)
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise BarberError(f"--alpha {self.alpha:g} is outside [0, 1]")
        if self.rebuild and self.sparsity_pattern.structured and self.granularity != "output1":
            raise BarberError(
                f"--granularity {self.granularity}: N:M patterns are rebuilt within an output; use output1"
            )
        self._settle_allocation()
        parse_mesh(self.mesh)
        self._check_processes()
        for option in ("samples", "length", "batch", "eval_windows", "reconstruct_batch", "rounds"):
            self._require_least(option, 1)
        for option in ("refine", "reconstruct", "seed"):
            self._require_least(option, 0)
        for option in ("refine", "reconstruct", "reconstruct_batch", "rounds"):
            if getattr(self, option) > MOST:
                raise BarberError(f"--{option.replace('_', '-')} {getattr(self, option)} is above {MOST}")
        self._refuse_idle()
        if not 0 < self.reconstruct_rate <= 1:
            raise BarberError(f"--reconstruct-rate {self.reconstruct_rate:g} is outside (0, 1]")
        if self.chooses and self.samples < 2:
            raise BarberError(
                "--samples 1: --alpha auto, --refine and --reconstruct hold samples apart; use at least 2"
            )
        if self.length < 2:
            raise BarberError("--length 1 leaves no next token; use at least 2")
        if self.eval_text and self.eval_dataset:
            raise BarberError("--eval-text and --eval-dataset: give one of them")
        if self.eval_windows is not None and not (self.eval_text or self.eval_dataset):
            raise BarberError("--eval-windows needs --eval-text or --eval-dataset")

    def _refuse_idle(self) -> None:
        idle = idle_options(self.rebuild, self.alpha == "auto", bool(self.refine), bool(self.reconstruct))
        for option, needs in idle.items():
            value = getattr(self, option)
            # A fixed alpha is there even where none was asked for: the published one.
            asks = value == "auto" if option == "alpha" else value != type(self).__dataclass_fields__[option].default
            if asks:
                raise BarberError(f"--{option.replace('_', '-')} {value} needs {needs}")

    def _require_least(self, option: str, least: int) -> None:
        value = getattr(self, option)
        if value is not None and value < least:
            raise BarberError(f"--{option.replace('_', '-')} {value} must be at least {least}")

    def _settle_start(self) -> None:
        """Either --method (wanda unless said) gives the starting mask, or --masks, or --sparse-ckpt."""
        given = [name for name, value in (("--masks", self.masks), ("--sparse-ckpt", self.sparse_ckpt)) if value]
        if given and self.method:
            raise BarberError(f"--method {self.method} and {given[0]} both give the starting mask; choose one")
        if given and self.sparsity is not None:
            raise BarberError(f"--sparsity {self.sparsity:g} conflicts with {given[0]}, which fixes the sparsity")
        if not given and self.method is None:
            object.__setattr__(self, "method", "wanda")
        if self.retain_reconstruction and not (self.method == "sparsegpt" or self.sparse_ckpt):
            raise BarberError("--retain-reconstruction needs updated weights: --method sparsegpt or --sparse-ckpt")

    def _settle_allocation(self) -> None:
        """The two options of OWL are there where OWL is, and only there."""
        options = {"owl_lambda": OWL_LAMBDA, "owl_m": OWL_M}
        if self.allocate == "uniform":
            for option in options:
                if getattr(self, option) is not None:
                    flag = f"--{option.replace('_', '-')}"
                    raise BarberError(f"{flag} {getattr(self, option):g} needs --allocate owl")
            return
        if self.method is None:
            given = "--masks" if self.masks else "--sparse-ckpt"
            raise BarberError(f"--allocate owl conflicts with {given}, which fixes every block's sparsity")
        if self.sparsity_pattern.structured:
            pattern = self.sparsity_pattern
            raise BarberError(f"--allocate owl conflicts with --pattern {pattern}, which fixes every block's sparsity")
        for option, value in options.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        if not 0 < self.owl_lambda <= 0.5:  # NaN fails this too
            raise BarberError(f"--owl-lambda {self.owl_lambda:g} is outside (0, 0.5]")
        if not 0 < self.owl_m < math.inf:
            raise BarberError(f"--owl-m {self.owl_m:g} must be a finite number above 0")

    def _check_processes(self) -> None:
        by_hand = (self.coordinator, self.processes, self.process)
        if all(option is None for option in by_hand):
            return
        if None in by_hand:
            raise BarberError("--coordinator, --processes and --process: give all three of them")
        if not re.fullmatch(r"\S+:[0-9]{1,5}", self.coordinator):
            raise BarberError(f"--coordinator {self.coordinator!r} is not host:port")
        if not 0 <= self.process < self.processes:
            raise BarberError(f"--process {self.process} is not one of the {self.processes} --processes, from 0 on")

    @property
    def changes(self) -> bool:
        """Whether anything is done after the starting masks."""
        return bool(self.rebuild or self.refine or self.reconstruct)

    @property
    def chooses(self) -> bool:
        """Whether something is chosen by its loss on samples held apart."""
        return bool(self.refine or self.reconstruct or (self.rebuild and self.alpha == "auto"))

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's activations are needed."""
        return self.chooses and self.target == "dense"

    @property
    def sparsity_pattern(self) -> SparsityPattern:
        """The pattern that --pattern and --sparsity mean together."""
        return SparsityPattern.parse("unstructured" if self.pattern is None else self.pattern, self.sparsity)
