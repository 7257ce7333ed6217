"""Write report.html: settings, results and plots of a run, from run.json and masks.safetensors alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from barber_jax.console.errors import BarberError
from barber_jax.console.outputs import write_whole
from barber_jax.convert.export import MASKS
from barber_jax.masks.mask_file import read_masks
from barber_jax.reports.markup import Html, element
from barber_jax.reports.parts import device_pairs, duration, kind_of, memory_figures, option_pairs, version_pairs
from barber_jax.reports.run_record import load_record
from barber_jax.stages.outliers import parse_map

REPORT = "report.html"


def write_report(folder: Path, name: str | None = None) -> Path:
    """Write report.html into a folder that holds run.json and masks.safetensors.

    Args:
        name: title of the report. Default: the folder's name.

    Returns:
        Path of report.html.

    Raises:
        BarberError: one of the two files is missing, damaged or of another version, or report.html cannot be written.
    """
    from barber_jax.reports.page import page

    record, outputs = load_record(folder), output_sparsity(folder / MASKS)
    matrices = {name for block in record["blocks"] for sub in block["sub_blocks"] for name in sub["matrices"]}
    if matrices != outputs.keys():
        odd = min(matrices ^ outputs.keys())
        raise BarberError(f"{folder}: run.json and {MASKS} are of different runs ({odd} is in one only); prune again")
    title = name or folder.resolve().name
    content = page(f"{title} - barber_jax", _sections(title, record, outputs))
    path = folder / REPORT
    write_whole(path, content)
    return path


def output_sparsity(masks: Path) -> dict[str, np.ndarray]:
    """Distribution of sparsity over the outputs of each matrix.

    Returns:
        Matrix name -> [minimum, 5 %, median, 95 %, maximum] of the fraction pruned in an output.

    Raises:
        BarberError: the mask file is missing or damaged.
    """
    file = read_masks(masks)
    return {name: np.quantile(1 - file.read(name).mean(axis=1), [0, 0.05, 0.5, 0.95, 1]) for name in file.names()}


def _sections(title: str, record: dict, outputs: dict[str, np.ndarray]) -> Iterator[Html]:
    """Yield the HTML elements of the report; `outputs` is from `output_sparsity`."""
    from barber_jax.reports import page

    options, totals, device = record["options"], record["totals"], record["device"]
    yield element("h1", title)
    yield page.soft(description(record))
    headline = [(f"{totals['sparsity']:.4f}", "sparsity"), (f"{totals['weights'] / 1e6:.1f} M", "prunable weights")]
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
    yield page.numbers([*headline, *memory_figures(record)])
    yield page.plots(_plots(record, outputs))
    yield from _tables(record, outputs)
    yield element("h2", "Settings and environment")
    yield _settings(record, options)


def description(record: dict) -> str:
    """Describe the run in a sentence: model, starting masks, stages and samples."""
    options, model = record["options"], record["model"]
    source = options["method"] or (options["masks"] and f"masks of {options['masks']}") or options["sparse_ckpt"]
    words = [
        f"{options['ckpt']} ({model['model_type']}, {model['blocks']} blocks, hidden size {model['hidden']}), "
        f"starting mask: {source}"
    ]
    if "allocation" in record:
        least, most = min(record["allocation"]), max(record["allocation"])
        how = "rising from block to block" if options.get("allocate") == "slope" else "by OWL"
        words.append(f"sparsity of blocks {how}, {least:.1%} to {most:.1%}")
    if options["rebuild"]:
        words.append(f"rebuilt by {options['granularity']} with alpha {options['alpha']}, metric {options['metric']}")
    else:
        words.append("not rebuilt")
    for option, what in (
        ("refine", "refined by up to {} swaps per output"),
        ("least_squares", "solved for by least squares in {} steps"),
        ("reconstruct", "reconstructed in {} steps"),
    ):
        if options.get(option):
            words.append(what.format(options[option]))
    words.append(f"{options['samples']} samples of {options['length']} tokens in {options['compute_dtype']}")
    return "; ".join(words)


def _plots(record: dict, outputs: dict[str, np.ndarray]) -> Iterator[Html]:
    from barber_jax.reports.figures import Plots, bars, heat, lines

    plots, blocks = Plots(), record["blocks"]
    names = [sub["name"] for sub in blocks[0]["sub_blocks"]]
    kinds = [kind_of(name) for sub in blocks[0]["sub_blocks"] for name in sub["matrices"]]
    of_block = [[m for sub in block["sub_blocks"] for m in sub["matrices"].items()] for block in blocks]
    if "swaps" in record["totals"]:
        losses = {
            f"{name} {when}": [block["sub_blocks"][index][f"loss_{when}"] for block in blocks]
            for index, name in enumerate(names)
            for when in ("before", "after")
        }
        title = "Reconstruction loss of each sub-block, before and after its stages"
        yield plots.draw(lines(losses, "block", "mean squared error", log=True), title)
        swaps = np.array([[100 * m["regrown"] / m["size"] for _, m in row] for row in of_block]).T
        yield plots.draw(heat(swaps, kinds, "block", "% of weights"), "Swaps in each matrix")
    sparsity = np.array([[m["pruned"] / m["size"] for _, m in row] for row in of_block]).T
    yield plots.draw(heat(sparsity, kinds, "block", "sparsity"), "Sparsity of each matrix")
    yield plots.draw(_ranges(outputs, kinds), "Sparsity of single outputs: range, middle 90 % and median")
    yield plots.draw(bars(record["totals"]["seconds_per_stage"], "seconds"), "Time in each stage, all blocks")
    maps = [[m.get("outliers_pruned") for _, m in row] for row in of_block]
    if all(each for row in maps for each in row):
        yield from _outliers(plots, maps, kinds)


def _ranges(outputs: dict[str, np.ndarray], kinds: list[str]):
    """Return a function that draws, for each kind of matrix, the distribution of its outputs' sparsity in all blocks.

    Args:
        outputs: from `output_sparsity`.
        kinds: `q_proj`, ...
    """
    groups = {kind: np.array([q for name, q in outputs.items() if kind_of(name) == kind]) for kind in kinds}

    def draw(axes) -> None:
        from barber_jax.reports.figures import SERIES

        for row, quantiles in enumerate(groups.values()):
            low, high = quantiles[:, 0].min(), quantiles[:, 4].max()
            axes.plot([low, high], [row, row], color=SERIES[5], linewidth=1)
            mean = quantiles.mean(axis=0)
            axes.plot([mean[1], mean[3]], [row, row], color=SERIES[0], linewidth=6, solid_capstyle="butt")
            axes.plot(mean[2], row, "o", color=SERIES[1], markersize=4)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set_xlabel("fraction pruned")
        axes.grid(True, axis="x", alpha=0.5)

    return draw


def _outliers(plots, maps: list[list[dict]], kinds: list[str]) -> Iterator[Html]:
    """Plot the outliers of the rebuild's metric that the masks prune: counts by block, and maps over the matrices.

    Args:
        maps: for each block and matrix, `outliers_pruned` of run.json.
        kinds: `q_proj`, ..., of the matrices.
    """
    from barber_jax.reports.figures import MAP, lines

    parsed = [[{when: parse_map(text) for when, text in each.items()} for each in row] for row in maps]
    counts = {
        f"pruned {when} the rebuild": [sum(int(each[when].sum()) for each in row) for row in parsed]
        for when in ("before", "after")
    }
    title = "Pruned outliers (an outlier is among the highest 1 % of its matrix's weight x gradient)"
    yield plots.draw(lines(counts, "block", "outliers pruned"), title)
    summed = {
        when: [sum(row[column][when] for row in parsed) for column in range(len(kinds))] for when in ("before", "after")
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

    title = "Positions of pruned outliers, summed over blocks: outputs down, inputs across, one scale for each column"
    yield plots.draw(draw, title, size=(9.6, 3.2), rows=2, columns=len(kinds))


def _tables(record: dict, outputs: dict[str, np.ndarray]) -> Iterator[Html]:
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
                lowest, _, median, _, highest = outputs.get(name, np.full(5, np.nan))
                entry = [name, f"{each['size']:,}", f"{each['pruned'] / each['size']:.4f}"]
                entry += [f"{lowest:.4f}", f"{median:.4f}", f"{highest:.4f}"]
                matrices.append([*entry, *([f"{each['regrown']:,}"] if rebuilt else [])])
    yield element("h2", "Blocks")
    yield table(head, rows)
    columns = ["matrix", "weights", "sparsity", "lowest output", "median output", "highest output"]
    body = table([*columns, *(["swaps"] if rebuilt else [])], matrices)
    yield element("details", element("summary", "All matrices"), body)


def _settings(record: dict, options: dict) -> Html:
    from barber_jax.reports.page import pairs

    origin = [("source of the starting masks", record["started_from"]["folder"])] if "started_from" in record else []
    return pairs([*option_pairs(options), *device_pairs(record), *origin, *version_pairs(record)])
