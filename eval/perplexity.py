"""python -m barber_jax.eval.perplexity: perplexity of a checkpoint, by the convention of the pruning literature.

Texts are cut into windows by data/windows.py, and the windows are evaluated by forward/perplexity.py.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from barber_jax.console import documents
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import expand
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.console.progress import Progress
from barber_jax.console.structure import fields, integer, items, number, text
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.convert.parameters import check_tensors
from barber_jax.data.begin import BeginToken, begin_id, settled
from barber_jax.data.calibration import load_ids
from barber_jax.data.windows import cut_windows, default_windows, evaluation_ids
from barber_jax.devices.mesh import Devices, is_primary
from barber_jax.devices.options import ComputeDtype, parse_mesh
from barber_jax.devices.settings import prepare_jax
from barber_jax.forward.perplexity import perplexity
from barber_jax.models import build_model


@dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity of a checkpoint: exp of the mean cross-entropy over consecutive windows of a text."""

    ckpt: str
    """Checkpoint to evaluate: a Hugging Face folder, a Hub id, or a .gguf file."""
    length: int
    """Tokens in a window (L), of which L-1 are predicted."""
    text: tuple[Path, ...] = ()
    """Texts: .txt, .jsonl, .parquet, .arrow or a saved dataset folder; one perplexity for each."""
    tokens: tuple[Path, ...] = ()
    """Token ids: .npy of integers, flattened; one perplexity for each."""
    dataset: tuple[Literal["wikitext2", "ptb", "c4"], ...] = ()
    """Datasets from the Hub; one perplexity for each."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    windows: int | None = None
    """Windows of each text, from its start. Default: all (c4: 256)."""
    begin_token: BeginToken = "auto"
    """Begin token: always = in front of each window of text, auto = as the model needs it."""
    batch: int | None = None
    """Windows in a micro-batch. Default: 8; on CPU as many as make about 1024 tokens."""
    mesh: str | None = None
    """Device mesh: data=N,model=M shards windows over N devices and linears over M. Default: one device."""
    offload_activations: bool = False
    """Keep the activations in host memory, except for the micro-batch being computed."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of activations and matrix products."""
    json: Path | None = None
    """Also write the result to this file. A study reads it as perplexity.json in the folder of a run."""

    def __post_init__(self):
        if not (self.text or self.tokens or self.dataset):
            raise BarberError("no text to evaluate on; give --text, --tokens or --dataset")
        parse_mesh(self.mesh)
        if self.length < 2:
            raise BarberError(f"--length {self.length} leaves no next token; use at least 2")
        for option in ("windows", "batch"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise BarberError(f"--{option} {value} must be at least 1")


def evaluate(config: PerplexityConfig) -> list[dict]:
    """Perplexity of the checkpoint on each of the configured texts.

    Returns:
        for each text `ckpt`, `source`, `begin_token` as settled, and what `forward.perplexity.perplexity` returns.

    Raises:
        BarberError: the checkpoint or a text cannot be read, a text is too short, or the mesh does not fit.
    """
    checkpoint = open_checkpoint(config.ckpt)
    model = build_model(checkpoint.config, jnp.dtype(config.compute_dtype))
    check_tensors(checkpoint, model)
    model.check_length(config.length)
    devices = Devices.of(parse_mesh(config.mesh))
    # The last micro-batch is padded, so the number of windows need not be a multiple of the data axis.
    devices.check(model.block(), devices.shape[0])
    results = []
    with Progress(silent=not is_primary()) as progress:
        # Token ids are used as they are.
        sources = [(str(path), load_ids(expand(path)), "auto") for path in config.tokens]
        begin, tokenizer = settled(config.begin_token, model.begins), functools.cache(checkpoint.tokenizer)
        for path in config.text:
            bounds = {"needed": config.windows and config.windows * config.length, "say": progress.say}
            ids = evaluation_ids(tokenizer, path=path, text_field=config.text_field, begin=begin, **bounds)
            sources.append((str(path), ids, begin))
        for name in config.dataset:
            sources.append((name, evaluation_ids(tokenizer, dataset=name, begin=begin), begin))
        texts = []
        for source, ids, choice in sources:
            windows = config.windows or default_windows(source)
            cut = (config.length, windows, source, model.vocabulary, begin_id(choice, tokenizer))
            texts.append((source, cut_windows(ids, *cut), choice))
        for source, windows, choice in texts:
            with progress.phase(f"perplexity on {Path(source).name}", model.layers, announce=True) as phase:
                offload = config.offload_activations
                measured = perplexity(checkpoint, model, windows, config.batch, devices, offload, phase)
            results.append({"ckpt": config.ckpt, "source": source, "begin_token": choice, **measured})
    return results


def run(arguments: list[str] | None = None) -> None:
    """Command line: print the perplexity of each text, and write the results to --json."""
    config = parse(PerplexityConfig, "barber_jax.eval.perplexity", arguments)
    prepare_jax()
    with output_file(config.json) as file:
        results = evaluate(config)
        if file:
            write_results(results, file)
    for result in results:
        name = f"{result['source']}: " if len(results) > 1 else ""
        print(f"{name}perplexity {result['perplexity']:.4f} ({result['windows']} windows of {result['length']} tokens)")


_RESULTS = items(
    fields(
        {"source": text, "perplexity": number(0, 1e308, finite=False)},
        {"windows": integer(1), "length": integer(1)},
    ),
    least=1,
)
"""Structure of the results in a file."""


def write_results(results: list[dict], path: Path) -> None:
    """Write the results of `evaluate` as JSON: a single result as the top-level object, several as a list `results`."""
    content = results[0] if len(results) == 1 else {"ckpt": results[0]["ckpt"], "results": results}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_results(path: Path) -> list[dict]:
    """Read a file written by `write_results`.

    Raises:
        BarberError: the file has other content.
    """
    try:
        content = documents.read(path)
        results = content["results"] if isinstance(content, dict) and "results" in content else [content]
        _RESULTS(results, "results")
    except (OSError, ValueError) as error:
        raise BarberError(
            f"{path}: not a file written by barber_jax.eval.perplexity --json ({error}); measure again"
        ) from None
    return results


if __name__ == "__main__":
    exit_with_one_line(run)
