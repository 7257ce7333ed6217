"""Write README.md of a recovered model: a Hugging Face model card, followed by the pruned model's own card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from barber_jax.reports.markup import markdown_block, markdown_code, markdown_text
from barber_jax.reports.model_card import base_name, front_matter, replace_card, sparse_tags, split_card, use
from barber_jax.reports.recover_page import command_lines, held_out_losses, short_count

PERPLEXITIES = ("dense_perplexity", "start_perplexity", "perplexity")
"""Entries of recover.json in the order of the table's columns: dense, pruned, recovered."""


def write_recover_card(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write README.md into the output folder. An existing README.md there is the pruned model's; its text is kept.

    Args:
        folder: output folder, which does not have its final name yet.
        name: final name of the folder.
        record: content of recover.json.

    Raises:
        BarberError: the file cannot be written.
    """
    replace_card(folder, lambda source: recover_card(name, record, source))


def recover_card(name: str, record: Mapping[str, Any], source: str = "") -> str:
    """Compose the text of the card; arguments as for `write_recover_card`, and the pruned model's card as `source`."""
    entries, below = split_card(source)
    run, checkpoint = record["source"]["run"], record["source"]["checkpoint"]
    base = _dense_model(record, entries)
    teacher = record["options"].get("teacher")
    tags = sparse_tags(run["options"]["method"] if run else None, record["pattern"], "recovered")
    parts = [
        front_matter(entries, base, [*tags, "distillation"] if teacher else tags),
        f"# {markdown_text(name)}",
        f"{markdown_code(base_name(base))} with {record['sparsity']:.1%} of the weights of its decoder blocks pruned "
        f"({markdown_text(record['pattern'])}) and the others trained on, with pruned weights held at zero, by "
        f"barber_jax {markdown_text(record['versions']['barber_jax'])}, "
        "[LLM-Barber](https://arxiv.org/abs/2408.10631) in JAX. "
        f"{_training(record)}",
        _results_table(record),
        markdown_block("\n".join(command_lines(record, name)), "sh"),
        *use(name),
        "In PyTorch, `barber_jax.convert.torch_masks.apply_masks(model, masks)` keeps pruned weights at zero during "
        "fine-tuning. `recover.json` and `report.html` describe the recovery.",
    ]
    if below.strip():
        parts.append(
            f"---\n\nModel card of the pruned model {markdown_code(base_name(checkpoint))}:\n\n{below.strip()}"
        )
    return "\n\n".join(parts) + "\n"


def _dense_model(record: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """The dense model: that of the pruning run, the pruned card's base model, the teacher, or else the checkpoint."""
    run, given = record["source"]["run"], entries.get("base_model")
    known = [run["options"]["ckpt"] if run else None, given if isinstance(given, str) else None]
    return next(filter(None, [*known, record["options"].get("teacher"), record["source"]["checkpoint"]]))


def _training(record: Mapping[str, Any]) -> str:
    """A sentence on what was trained."""
    options = record["options"]
    teacher, mix, scope = options.get("teacher"), options.get("mix"), options.get("scope")
    words = [f"Recovered in {record['steps']:,} steps on {short_count(record['tokens'])} tokens"]
    if teacher:
        part = f" and {mix:.0%} cross-entropy" if mix else ""
        words.append(f"trained on the KL divergence to {markdown_code(base_name(teacher))}{part}")
    else:
        words.append("trained on the cross-entropy of the next token")
    words += [f"scope {markdown_text(scope)}"] if scope else []
    if losses := held_out_losses(record):
        words.append(f"held-out loss {losses[0]:.4g} → {losses[1]:.4g}")
    return ", ".join(words) + "."


def _results_table(record: Mapping[str, Any]) -> str:
    """Markdown table of sparsity and perplexity of the dense, the pruned and the recovered model."""
    sparsity = f"{record['sparsity']:.4f}"
    rows = [["sparsity of the decoder blocks", "0", sparsity, sparsity]]
    if measured := record.get("perplexity"):
        cells = [f"{each['perplexity']:.2f}" if (each := record.get(key)) else "" for key in PERPLEXITIES]
        source = Path(measured["source"]).name
        name = f"perplexity, {source}, {measured['windows']} windows of {measured['length']}"
        rows.append([markdown_text(name), *cells])
    lines = ["| | dense | pruned | recovered |", "|---|--:|--:|--:|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
