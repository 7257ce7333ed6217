"""Write report.html of a recovered checkpoint: losses, learning rate, moved weights, origin; from recover.json."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barber_jax.console.outputs import write_whole
from barber_jax.console.structure import MAX_NUMBER
from barber_jax.reports.markup import Html, element
from barber_jax.reports.parts import device_pairs, duration, kind_of, memory_figures, option_pairs, version_pairs
from barber_jax.reports.recover_record import read_recover_record
from barber_jax.reports.report_page import REPORT
from barber_jax.reports.report_page import description as pruning_description

SMOOTHING = 20
"""The training curve is a mean over this part of all its points."""


def write_recover_report(folder: Path, name: str | None = None) -> Path:
    """Write report.html into a folder that holds recover.json.

    Args:
        name: title of the report. Default: the folder's name.

    Returns:
        Path of report.html.

    Raises:
        BarberError: recover.json is missing, damaged or of another version, or report.html cannot be written.
    """
    from barber_jax.reports.page import page

    record, title = read_recover_record(folder), name or folder.resolve().name
    content = page(f"{title} - barber_jax", sections(title, record))
    path = folder / REPORT
    write_whole(path, content)
    return path


def sections(title: str, record: Mapping[str, Any]) -> Iterator[Html]:
    """Yield the HTML elements of the report; `record` is the content of recover.json."""
    from barber_jax.reports import page

    yield element("h1", title)
    yield page.soft(f"{description(record)}.")
    yield page.numbers(headline(record))
    yield page.plots(_plots(record))
    if record["evaluations"]:
        yield element("h2", "Held-out text")
        yield _evaluations(record)
    yield element("h2", "The checkpoint before")
    yield from _origin(record)
    yield element("h2", "Commands")
    yield page.commands(command_lines(record, title))
    yield element("h2", "Settings and environment")
    processes = [("processes", record["processes"])]
    shown = [*option_pairs(record["options"]), *device_pairs(record), *processes, *version_pairs(record)]
    yield page.pairs(shown)


def description(record: Mapping[str, Any]) -> str:
    """Describe the recovery in a sentence: checkpoint, masks, loss, text and steps."""
    options, model = record["options"], record["model"]
    checkpoint = f"{options['ckpt']} ({model['model_type']}, {model['blocks']} blocks, hidden size {model['hidden']})"
    pattern = "" if record["pattern"] == "unstructured" else f", {record['pattern']}"
    words = [
        f"{checkpoint}, sparsity {record['sparsity']:.4f}{pattern}, recovered with its masks held",
        learned_from(record),
        f"{record['steps']:,} steps of {record['tokens_per_step']:,} tokens",
        *([f"trained: {options['scope']}"] if options.get("scope") else []),
        *([f"in {options['compute_dtype']}"] if options.get("compute_dtype") else []),
        f"written: the weights of step {written_step(record):,} ({record['written']})",
    ]
    return "; ".join(words)


def learned_from(record: Mapping[str, Any]) -> str:
    """What the loss compares with: a teacher, the next token, or both."""
    teacher, mix = record["options"].get("teacher"), record["options"].get("mix")
    if not teacher:
        return "trained on the cross-entropy of the next token"
    return f"trained on the KL divergence to {teacher}" + (f" and {mix:.0%} cross-entropy" if mix else "")


def written_step(record: Mapping[str, Any]) -> int:
    """Step whose weights were written."""
    return record["best_step"] if record["written"] == "best" else record["steps"]


def held_out_losses(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Held-out loss of the first evaluation, and of the weights that were written; None without evaluations."""
    losses = {each["step"]: each["loss"] for each in record["evaluations"]}
    if not losses:
        return None
    last = next(reversed(losses.values()))
    return next(iter(losses.values())), losses.get(written_step(record), last)


def headline(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key figures, (value, label): perplexity or held-out loss first."""
    figures = []
    if measured := record.get("perplexity"):
        start, source = record.get("start_perplexity"), Path(measured["source"]).name
        shown = [*([f"{start['perplexity']:.2f}"] if start else []), f"{measured['perplexity']:.2f}"]
        name = "perplexity, pruned → recovered" if start else "perplexity, recovered"
        figures.append((" → ".join(shown), f"{name}, {source}"))
    if dense := record.get("dense_perplexity"):
        figures.append((f"{dense['perplexity']:.2f}", f"perplexity, dense, {Path(dense['source']).name}"))
    if losses := held_out_losses(record):
        figures.append((" → ".join(f"{loss:.4g}" for loss in losses), "held-out loss, start → written"))
    figures.append((f"{record['sparsity']:.4f}", "sparsity, as before"))
    figures.append((short_count(record["tokens"]), "tokens"))
    figures.append((f"{record['tokens_per_second']:,.0f}", "tokens per second"))
    if record.get("share_of_peak") is not None:
        figures.append((f"{record['share_of_peak']:.0%}", "of the measured peak of matrix products"))
    device = record["device"]
    figures.append((duration(record["seconds"]), f"on {device['count']} x {device['kind']}"))
    return [*figures, *memory_figures(record)]


def short_count(count: int) -> str:
    """A count with a unit: 1234567 -> `1.23 M`."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:,}"


def command_lines(record: Mapping[str, Any], out: str) -> list[str]:
    """Command lines that reproduce the result in a folder `out`: of both steps, where the first is known."""
    commands, lines = record["commands"], []
    if commands["prune"] is not None:
        pruned = shlex.join([*commands["prune"], "--out", record["options"]["ckpt"]])
        lines.append(f"python -m barber_jax.prune {pruned}")
    return [*lines, f"python -m barber_jax.recover {shlex.join([*commands['recover'], '--out', out])}"]


def _evaluations(record: Mapping[str, Any]) -> Html:
    from barber_jax.reports.page import table

    distilled = record["evaluations"][0]["kl"] is not None
    head = ["step", "loss", *(["KL divergence"] if distilled else []), "cross-entropy", "seconds", ""]
    rows = []
    for each in record["evaluations"]:
        marks = [*(["best"] if each["step"] == record["best_step"] else [])]
        marks += [*(["written"] if each["step"] == written_step(record) else [])]
        losses = [each["loss"], *([each["kl"]] if distilled else []), each["cross_entropy"]]
        cells = [f"{each['step']:,}", *(f"{loss:.4f}" for loss in losses), f"{each['seconds']:.1f}"]
        rows.append([*cells, ", ".join(marks)])
    return table(head, rows)


def _origin(record: Mapping[str, Any]) -> Iterator[Html]:
    from barber_jax.reports.page import numbers, soft

    source = record["source"]
    run, earlier = source["run"], source.get("recovered")
    yield element("p", source["checkpoint"])
    if run is None:
        yield soft("Its run.json is not known.")
    else:
        totals, options = run["totals"], run["options"]
        figures = [(f"{totals['sparsity']:.4f}", "sparsity")]
        figures.append((options["method"] or "given", "starting masks"))
        if "perplexity" in run:
            name = f"perplexity, {Path(run['perplexity']['source']).name}"
            figures.append((f"{run['perplexity']['perplexity']:.2f}", name))
        device = run["device"]
        figures.append((duration(totals["seconds"]), f"on {device['count']} x {device['kind']}"))
        yield soft(f"Pruned from {pruning_description(run)}.")
        yield numbers(figures)
    if earlier:
        words = f"{earlier['steps']:,} steps, {short_count(earlier['tokens'])} tokens, {duration(earlier['seconds'])}"
        yield soft(f"Recovered before: {words}.")


def _plots(record: Mapping[str, Any]) -> Iterator[Html]:
    from barber_jax.reports.figures import Plots, heat

    plots, training, evaluations = Plots(), record["training"], record["evaluations"]
    if training or evaluations:
        title = "Loss: training (mean over neighbouring steps, and single steps) and held-out text"
        yield plots.draw(_losses(record, ("loss",), ("",)), title)
        if (evaluations or training)[0]["kl"] is not None:
            names = ("KL divergence", "cross-entropy")
            title = "The two parts of the loss"
            yield plots.draw(_losses(record, ("kl", "cross_entropy"), names), title)
    if training:
        yield plots.draw(_curve(training, "rate", "learning rate"), "Learning rate")
        title = "Norm of the gradient, before clipping"
        yield plots.draw(_curve(training, "gradient_norm", "gradient norm", log=True), title)
    if record["movement"]:
        names = list(record["movement"][0]["weights"])
        values = np.array([_shown(list(each["weights"].values())) for each in record["movement"]]).T
        title = "How far each matrix moved: norm of its change over its norm before"
        yield plots.draw(heat(100 * values, [kind_of(name) for name in names], "block", "%"), title)


def _shown(values: Sequence[float]) -> np.ndarray:
    """Values for a plot, NaN where they are too large for one."""
    array = np.array(values, np.float64)
    return np.where(np.abs(array) < MAX_NUMBER, array, np.nan)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Centred mean over 1 / `SMOOTHING` of all values; at the ends, and beside NaN, over those that are there."""
    array = _shown(values)
    known, window = np.isfinite(array), np.ones(2 * (len(array) // SMOOTHING // 2) + 1)
    total = np.convolve(np.where(known, array, 0), window, "same")
    count = np.convolve(known, window, "same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _losses(record: Mapping[str, Any], keys: Sequence[str], names: Sequence[str]):
    """Return a function that draws the training and the held-out curve of each key, the written step marked.

    Args:
        keys: of the entries of `training` and `evaluations`.
        names: of the keys, in the legend.
    """

    def draw(axes) -> None:
        from barber_jax.reports.figures import SERIES

        training, evaluations = record["training"], record["evaluations"]
        steps = [float(each["step"]) for each in training]
        for index, (key, name) in enumerate(zip(keys, names, strict=True)):
            label, (light, dark) = f" {name}".rstrip(), (SERIES[2 * index], SERIES[2 * index + 1])
            if training and training[0][key] is not None:
                values = [each[key] for each in training]
                axes.plot(steps, _shown(values), color=light, alpha=0.25, linewidth=0.7)
                axes.plot(steps, smoothed(values), color=light, label=f"training{label}")
            if evaluations and evaluations[0][key] is not None:
                held_out = _shown([each[key] for each in evaluations])
                at = [float(each["step"]) for each in evaluations]
                axes.plot(at, held_out, "o-", color=dark, label=f"held-out{label}")
                best = [each["step"] for each in evaluations].index(record["best_step"])
                mark = {"markersize": 9, "color": dark, "linestyle": "none"}
                axes.plot(at[best], held_out[best], "*", label=None if index else "best step", **mark)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.grid(True, axis="y", alpha=0.5)
        if axes.lines:
            axes.legend(fontsize=8)

    return draw


def _curve(training: Sequence[Mapping[str, Any]], key: str, label: str, log: bool = False):
    """Return a function that draws one entry of `training` over the steps; with `log`, smoothed, on such an axis."""

    def draw(axes) -> None:
        values = _shown([each[key] for each in training])
        steps = [float(each["step"]) for each in training]
        axes.plot(steps, smoothed(values) if log else values)
        if log:
            axes.plot(steps, values, color=axes.lines[0].get_color(), alpha=0.25, linewidth=0.7)
        if log and np.all(values[np.isfinite(values)] > 0):
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel=label)
        axes.grid(True, axis="y", alpha=0.5)

    return draw
