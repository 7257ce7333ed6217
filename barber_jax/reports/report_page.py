"""report.html: a run for a person to look at. Made from run.json and masks.safetensors alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from barber_jax.console.files import writing
from barber_jax.convert.export import MASKS
from barber_jax.masks.mask_file import read_masks
from barber_jax.reports.run_record import load_record
from barber_jax.stages.outliers import parse_map

REPORT = "report.html"


def write_report(folder: Path, name: str | None = None) -> Path:
    """Make report.html in a folder that holds run.json and masks.safetensors.

    Args:
        name: what to call the run; None: the folder's name.

    Raises:
        BarberError: one of the two is missing, damaged or of another version, or nothing can be written.
    """
    from barber_jax.reports.page import page

    record = load_record(folder)
    title = name or folder.resolve().name
    content = page(f"{title} - barber_jax", _parts(title, record, spread(folder / MASKS)))
    path = folder / REPORT
    with writing(path):
        path.write_text(content, encoding="utf-8")
    return path


def spread(masks: Path) -> dict[str, np.ndarray]:
    """How sparsity spreads over outputs.

    Returns:
        matrix name -> [least, 5 %, median, 95 %, most] of the fraction pruned in an output.

    Raises:
        BarberError: the mask file is missing or damaged.
    """
    file = read_masks(masks)
    return {name: np.quantile(1 - file.read(name).mean(axis=1), [0, 0.05, 0.5, 0.95, 1]) for name in file.names()}


def _kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `up_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _parts(title: str, record: dict, outputs: dict[str, np.ndarray]) -> Iterator[str]:
    from barber_jax.reports.figures import escape
    from barber_jax.reports.page import numbers

    options, totals, device = record["options"], record["totals"], record["device"]
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p class='soft'>{escape(sentence(record))}</p>"
    headline = [(f"{totals['sparsity']:.4f}", "sparsity"), (f"{totals['weights'] / 1e6:.1f} M", "weights looked at")]
    if "swaps" in totals:
        change = totals["loss_after"] / totals["loss_before"] - 1 if totals["loss_before"] else 0.0
        share = totals["swaps"] / totals["weights"]
        headline += [(f"{totals['swaps']:,} ({share:.2%})", "swaps"), (f"{change:+.1%}", "block loss")]
    if "perplexity" in record:
        measured = f"{record['perplexity']['perplexity']:.2f}"
        if "dense_perplexity" in record:
            measured = f"{record['dense_perplexity']['perplexity']:.2f} → {measured}"
        name = "perplexity, dense → pruned" if "dense_perplexity" in record else "perplexity"
        headline.append((measured, f"{name}, {Path(record['perplexity']['source']).name}"))
    headline.append((duration(totals["seconds"]), f"on {device['count']} x {device['kind']}"))
    memory = record.get("peak_memory", {})
    for key, where in (("host_bytes", "host"), ("device_bytes", "device")):
        if key in memory:
            headline.append((f"{memory[key] / 2**30:.2f} GiB", f"peak {where} memory"))
    yield numbers(headline)
    yield "<div class='plots'>" + "".join(_plots(record, outputs)) + "</div>"
    yield from _tables(record, outputs)
    yield "<h2>Settings and environment</h2>"
    yield _settings(record, options)


def sentence(record: dict) -> str:
    """What was done, in a sentence."""
    options, model = record["options"], record["model"]
    source = options["method"] or (options["masks"] and f"masks of {options['masks']}") or options["sparse_ckpt"]
    words = [
        f"{options['ckpt']} ({model['model_type']}, {model['blocks']} blocks of {model['hidden']}), start: {source}"
    ]
    if "allocation" in record:
        least, most = min(record["allocation"]), max(record["allocation"])
        words.append(f"sparsity by OWL, {least:.1%} to {most:.1%} of a block")
    if options["rebuild"]:
        words.append(f"rebuilt by {options['granularity']} with alpha {options['alpha']}, metric {options['metric']}")
    else:
        words.append("not rebuilt")
    for option, what in (
        ("refine", "refined by up to {} swaps an output"),
        ("reconstruct", "reconstructed in {} steps"),
    ):
        if options.get(option):
            words.append(what.format(options[option]))
    words.append(f"{options['samples']} samples of {options['length']} tokens in {options['compute_dtype']}")
    return "; ".join(words)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _plots(record: dict, outputs: dict[str, np.ndarray]) -> Iterator[str]:
    from barber_jax.reports.figures import Plots, bars, heat, lines

    plots, blocks = Plots(), record["blocks"]
    names = [sub["name"] for sub in blocks[0]["sub_blocks"]]
    matrices = {
        _kind(name): place for place, name in enumerate(n for s in blocks[0]["sub_blocks"] for n in s["matrices"])
    }
    of_block = [[m for sub in block["sub_blocks"] for m in sub["matrices"].items()] for block in blocks]
    if "swaps" in record["totals"]:
        losses = {
            f"{name} {when}": [block["sub_blocks"][place][f"loss_{when}"] for block in blocks]
            for place, name in enumerate(names)
            for when in ("before", "after")
        }
        title = "Reconstruction loss of each sub-block against its dense output, before and after the rebuild"
        yield plots.draw(lines(losses, "block", "mean squared error", log=True), title)
        swaps = np.array([[100 * m["regrown"] / m["size"] for _, m in row] for row in of_block]).T
        yield plots.draw(heat(swaps, list(matrices), "block", "% of weights"), "Swaps in each matrix")
    sparsity = np.array([[m["pruned"] / m["size"] for _, m in row] for row in of_block]).T
    yield plots.draw(heat(sparsity, list(matrices), "block", "sparsity"), "Sparsity of each matrix")
    yield plots.draw(_boxes(outputs, matrices), "Sparsity of single outputs: all, 90 % of them, and the median")
    yield plots.draw(bars(record["totals"]["seconds_per_stage"], "seconds"), "Time in each stage, all blocks")
    maps = [[m.get("outliers_pruned") for _, m in row] for row in of_block]
    if all(each for row in maps for each in row):
        yield from _outliers(plots, maps, list(matrices))


def _boxes(outputs: dict[str, np.ndarray], matrices: dict[str, int]):
    """Draws, for each kind of matrix, how the sparsity of its outputs is spread over all blocks."""
    groups = {kind: np.array([q for name, q in outputs.items() if _kind(name) == kind]) for kind in matrices}

    def draw(axes) -> None:
        from barber_jax.reports.figures import SERIES

        for place, quantiles in enumerate(groups.values()):
            low, high = quantiles[:, 0].min(), quantiles[:, 4].max()
            axes.plot([low, high], [place, place], color=SERIES[5], linewidth=1)
            inner = quantiles.mean(axis=0)
            axes.plot([inner[1], inner[3]], [place, place], color=SERIES[0], linewidth=6, solid_capstyle="butt")
            axes.plot(inner[2], place, "o", color=SERIES[1], markersize=4)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set_xlabel("fraction pruned")
        axes.grid(True, axis="x", alpha=0.5)

    return draw


def _outliers(plots, maps: list[list[dict]], kinds: list[str]) -> Iterator[str]:
    """Where the masks prune outliers of the metric: maps over outputs and inputs, and counts by block."""
    from barber_jax.reports.figures import MAP, lines

    read = [[{when: parse_map(text) for when, text in each.items()} for each in row] for row in maps]
    counts = {
        f"pruned {when} the rebuild": [sum(int(each[when].sum()) for each in row) for row in read]
        for when in ("before", "after")
    }
    title = "Outliers (the highest 1 % of each matrix's weight x gradient) that the mask prunes"
    yield plots.draw(lines(counts, "block", "outliers pruned"), title)
    summed = {
        when: [sum(row[place][when] for row in read) for place in range(len(kinds))] for when in ("before", "after")
    }

    def draw(axes) -> None:
        for column, kind in enumerate(kinds):
            highest = max(1, max(summed[when][column].max() for when in summed))
            for row, when in enumerate(summed):
                each = axes[row, column]
                each.imshow(
                    summed[when][column], vmin=0, vmax=highest, cmap=MAP, interpolation="nearest", aspect="auto"
                )
                each.set_xticks([])
                each.set_yticks([])
                total = summed[when][column].sum()
                each.set_title(f"{kind}\n{total:,}" if row == 0 else f"{total:,}")
                if column == 0:
                    each.set_ylabel(f"{when}\noutputs")
                if row == len(summed) - 1:
                    each.set_xlabel("inputs")

    title = "Where pruned outliers lie, summed over blocks: outputs down, inputs across; one scale for each column"
    yield plots.draw(draw, title, size=(9.6, 3.2), rows=2, columns=len(kinds))


def _tables(record: dict, outputs: dict[str, np.ndarray]) -> Iterator[str]:
    from barber_jax.reports.page import table

    rebuilt = "swaps" in record["totals"]
    head = ["block", "sub-block", "sparsity", *(["swaps", "loss before", "loss after", "change"] if rebuilt else [])]
    rows, matrices = [], []
    for block in record["blocks"]:
        for sub in block["sub_blocks"]:
            row = [block["block"], sub["name"], f"{sub['sparsity']:.4f}"]
            if rebuilt:
                before, after = sub["loss_before"], sub["loss_after"]
                change = f"{after / before - 1:+.1%}" if before else ""
                row += [f"{sub['swaps']:,}", f"{before:.4g}", f"{after:.4g}", change]
            rows.append(row)
            for name, each in sub["matrices"].items():
                least, _, median, _, most = outputs.get(name, np.full(5, np.nan))
                entry = [name, f"{each['size']:,}", f"{each['pruned'] / each['size']:.4f}"]
                entry += [f"{least:.4f}", f"{median:.4f}", f"{most:.4f}"]
                matrices.append([*entry, *([f"{each['regrown']:,}"] if rebuilt else [])])
    yield "<h2>Blocks</h2>" + table(head, rows)
    columns = ["matrix", "weights", "sparsity", "least output", "median output", "most output"]
    body = table([*columns, *(["swaps"] if rebuilt else [])], matrices)
    yield f"<details><summary>Every matrix</summary>{body}</details>"


def _settings(record: dict, options: dict) -> str:
    from barber_jax.reports.page import pairs

    shown = [(f"--{key.replace('_', '-')}", value) for key, value in options.items() if value not in (None, False)]
    device = record["device"]
    shown += [("devices", f"{device['count']} x {device['kind']} ({device['platform']})")]
    if "started_from" in record:
        shown.append(("starting masks from", record["started_from"]["folder"]))
    return pairs([*shown, *((f"{name} version", version) for name, version in record["versions"].items())])
