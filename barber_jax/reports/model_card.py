"""Write README.md of the pruned model: a Hugging Face model card, followed by the dense model's own card."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from barber_jax.console import documents
from barber_jax.console.files import writing
from barber_jax.convert.export import MASKS
from barber_jax.data.calibration import split_source
from barber_jax.reports.markup import markdown_block, markdown_code, markdown_text

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")
"""Entries of the dense model's front matter that also apply to the pruned model."""
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_model_card(folder: Path, name: str, record: Mapping[str, Any], command: Sequence[str]) -> None:
    """Write README.md into the output folder. An existing README.md there is the dense model's; its text is kept.

    Args:
        folder: output folder, which does not have its final name yet.
        name: final name of the folder.
        record: content of run.json.
        command: options of barber_jax.prune that reproduce the result.

    Raises:
        BarberError: the file cannot be written.
    """
    replace_card(folder, lambda source: model_card(name, record, command, source))


def replace_card(folder: Path, compose: Callable[[str], str]) -> None:
    """Write README.md of a folder, composed from the text of the one that is there, "" if there is none.

    Raises:
        BarberError: the file cannot be written.
    """
    path = folder / CARD
    source = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    with writing(path):
        path.write_text(compose(source), encoding="utf-8")


def model_card(name: str, record: Mapping[str, Any], command: Sequence[str], source: str = "") -> str:
    """Compose the text of the card; arguments as for `write_model_card`, and the dense model's card as `source`."""
    entries, below = split_card(source)
    base = str(record["options"]["ckpt"])
    shown = base_name(base)
    parts = [
        front_matter(entries, base, _tags(record)),
        f"# {markdown_text(name)}",
        f"{markdown_code(shown)} with {record['totals']['sparsity']:.1%} of the weights of its decoder blocks pruned "
        f"({markdown_text(record['options']['pattern'])}) by barber_jax "
        f"{markdown_text(record['versions']['barber_jax'])}, [LLM-Barber](https://arxiv.org/abs/2408.10631) in JAX. "
        f"{markdown_text(_method(record['options']))}",
        _results_table(record),
        markdown_block("python -m barber_jax.prune " + shlex.join([*command, "--out", name]), "sh"),
        *use(name),
        "In PyTorch, `barber_jax.convert.torch_masks.apply_masks(model, masks)` keeps pruned weights at zero during "
        "fine-tuning. `run.json` and `report.html` describe the pruning run.",
    ]
    if below.strip():
        parts.append(f"---\n\nModel card of the dense model {markdown_code(shown)}:\n\n{below.strip()}")
    return "\n\n".join(parts) + "\n"


def is_hub_id(checkpoint: str) -> bool:
    """Whether a checkpoint is named by its Hub id, and not by a path."""
    return HUB_ID.fullmatch(checkpoint) is not None and not Path(checkpoint).exists()


def base_name(checkpoint: str) -> str:
    """Name of a checkpoint for readers: its Hub id, or of a path the last part alone."""
    return checkpoint if is_hub_id(checkpoint) else Path(checkpoint).name


def front_matter(entries: Mapping[str, Any], base: str, tags: Sequence[str]) -> str:
    """Front matter of a card.

    Args:
        entries: of the front matter of the card before; those of `INHERITED` are kept.
        base: the dense model, a Hub id or a path.
        tags: of the card.
    """
    front: dict[str, Any] = {key: entries[key] for key in INHERITED if key in entries}
    front |= {"base_model": base} if is_hub_id(base) else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(tags)}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def use(name: str) -> list[str]:
    """Section on how to load the model and its masks from the folder `name`."""
    return [
        "## Use",
        markdown_block(
            "from transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({_quoted(name)})  # pruned weights are zero",
            "python",
        ),
        f"`{MASKS}` holds the mask of each pruned weight, `numpy.packbits` of a bool [out, in] array, True = kept:",
        markdown_block(
            "from barber_jax.masks import read_masks\n\n"
            f"masks = read_masks({_quoted(f'{name}/{MASKS}')})\n"
            "kept = masks.read(masks.names()[0])  # bool [out, in]",
            "python",
        ),
    ]


def _quoted(text: str) -> str:
    """Text as a literal of Python, in double quotes where it needs none escaped."""
    return f'"{text}"' if text.isprintable() and not set(text) & set('"\\\\') else repr(text)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into front matter and text. Front matter that is not a YAML mapping is dropped."""
    found = FRONT_MATTER.match(text)
    if not found:
        return {}, text
    try:
        entries = documents.parse(found[1], "yaml")
    except documents.DocumentError:
        entries = None
    return entries if isinstance(entries, dict) else {}, text[found.end() :]


def _tags(record: Mapping[str, Any]) -> list[str]:
    options = record["options"]
    return sparse_tags(options["method"], options["pattern"])


def sparse_tags(method: str | None, pattern: str, *more: str) -> list[str]:
    """Tags of a sparse model by barber_jax: those of all, `more`, the criterion if one is known, and the pattern."""
    return ["sparse", "pruned", *more, "llm-barber", "barber_jax", *([method] if method else []), pattern]


def _method(options: Mapping[str, Any]) -> str:
    """A sentence on how the model was pruned."""
    start = options["method"] or (options["masks"] and "a given mask file") or "a given pruned checkpoint"
    steps = [f"Starting mask: {start}"]
    if options["rebuild"]:
        steps.append(f"rebuilt within {options['granularity']} with alpha {options['alpha']}")
    if options["refine"]:
        steps.append(f"refined by up to {options['refine']} swaps per output")
    if options.get("least_squares"):
        steps.append("kept weights of each linear solved for by least squares")
    if options["reconstruct"]:
        steps.append(f"kept weights trained for {options['reconstruct']} steps per sub-block")
    written, text = split_source(str(options.get("calibration", "")))
    by = f", {'half of them ' if text else ''}written by the dense model itself" if written else ""
    return ", ".join(steps) + f"; {options['samples']} calibration samples of {options['length']} tokens{by}."


def _results_table(record: Mapping[str, Any]) -> str:
    """Markdown table of sparsity and perplexity."""
    rows = [("sparsity of the decoder blocks", "0", f"{record['totals']['sparsity']:.4f}")]
    if "perplexity" in record:
        dense = record.get("dense_perplexity", {}).get("perplexity")
        measured = record["perplexity"]
        text = f"perplexity, {Path(measured['source']).name}, {measured['windows']} windows of {measured['length']}"
        rows.append((text, f"{dense:.2f}" if dense else "", f"{measured['perplexity']:.2f}"))
    lines = [
        "| | dense | pruned |",
        "|---|--:|--:|",
        *(f"| {markdown_text(name)} | {a} | {b} |" for name, a, b in rows),
    ]
    return "\n".join(lines)
