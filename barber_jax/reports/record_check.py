"""The structure of run.json, checked as a whole when it is read, so that callers can rely on it."""

import dataclasses
from typing import Any

from barber_jax.console.structure import (
    WrongStructure,
    fields,
    flag,
    integer,
    items,
    mapping,
    number,
    optional,
    scalar,
    text,
)
from barber_jax.criteria.allocation import AllocationOptions
from barber_jax.criteria.gblm import GblmOptions
from barber_jax.stages.outliers import parse_map

START_OPTIONS = tuple(field.name for group in (AllocationOptions, GblmOptions) for field in dataclasses.fields(group))
"""Names of the options that belong to a starting mask, besides its method, sparsity and pattern."""

FRACTION = number(0, 1)
SECONDS = number(0)
LOSS = number(0, finite=False)


def _outlier_map(value: Any, place: str) -> None:
    text(value, place)
    try:
        counts = parse_map(value)
        if counts.ndim != 2 or counts.min() < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise WrongStructure(f"{place} is not a map of counts") from None


_MATRIX = fields(
    {"size": integer(1), "pruned": integer()},
    {"regrown": integer(), "outliers_pruned": fields({"before": _outlier_map, "after": _outlier_map})},
)
_LOSSES = ("loss_before", "loss_after", "validation_loss_before", "validation_loss_after")
_SUB_BLOCK = fields(
    {"name": text, "sparsity": FRACTION, "matrices": mapping(_MATRIX, least=1)},
    {"swaps": integer(), **dict.fromkeys(_LOSSES, LOSS)},
)
MEASURED = fields(
    {"source": text, "perplexity": number(0, 1e308, finite=False), "windows": integer(1), "length": integer(1)}
)
_OPTION_KINDS = {
    "ckpt": text,
    "out": text,
    "method": optional(text),
    "masks": optional(text),
    "sparse_ckpt": optional(text),
    "sparsity": FRACTION,
    "pattern": text,
    "rebuild": flag,
    "seed": integer(),
    "samples": integer(1),
    "length": integer(1),
    "compute_dtype": text,
    "granularity": optional(text),
    "alpha": scalar,
    "metric": text,
}


DEVICE = fields({"platform": text, "kind": text, "count": integer(1)})
MODEL = fields({"model_type": text, "blocks": integer(1), "hidden": integer(1)})


def _options(value: Any, place: str) -> None:
    fields(_OPTION_KINDS)(value, place)
    mapping(scalar)(value, place)


RECORD = fields(
    {
        "options": _options,
        "versions": mapping(text),
        "device": DEVICE,
        "model": MODEL,
        "blocks": items(
            fields({"block": integer(), "sub_blocks": items(_SUB_BLOCK, least=1), "seconds": mapping(SECONDS)}),
            least=1,
        ),
        "totals": fields(
            {
                "weights": integer(1),
                "pruned": integer(),
                "sparsity": FRACTION,
                "seconds": SECONDS,
                "seconds_per_stage": mapping(SECONDS),
            },
            {"swaps": integer(), **dict.fromkeys(_LOSSES, LOSS)},
        ),
        "peak_memory": mapping(integer()),
    },
    {
        "perplexity": MEASURED,
        "dense_perplexity": MEASURED,
        "allocation": items(FRACTION, least=1),
        "written_calibration": fields(
            {"samples": integer(1), "begins_with": text, "token": optional(integer()), "seconds": SECONDS}
        ),
        "started_from": fields(
            {"folder": text, "method": optional(text), "rebuild": flag, "seconds": SECONDS},
            dict.fromkeys(START_OPTIONS, scalar),
        ),
    },
)


def check_record(record: dict) -> None:
    """Check run.json of the current version: kinds of all values, and what they must have in common.

    Raises:
        WrongStructure: the message names the first place that is wrong.
    """
    RECORD(record, "")
    blocks, rebuilt = record["blocks"], "swaps" in record["totals"]
    first = [(sub["name"], len(sub["matrices"])) for sub in blocks[0]["sub_blocks"]]
    if "versions" in record and "barber_jax" not in record["versions"]:
        raise WrongStructure("versions.barber_jax is missing")
    if rebuilt and not {"loss_before", "loss_after"} <= record["totals"].keys():
        raise WrongStructure("totals holds swaps but no losses")
    for index, block in enumerate(blocks):
        place = f"blocks[{index}]"
        if [(sub["name"], len(sub["matrices"])) for sub in block["sub_blocks"]] != first:
            raise WrongStructure(f"{place} has other sub-blocks or matrices than the first block")
        for sub in block["sub_blocks"]:
            if rebuilt and not {"swaps", "loss_before", "loss_after"} <= sub.keys():
                raise WrongStructure(f"{place}.{sub['name']} lacks swaps or losses")
            for name, matrix in sub["matrices"].items():
                if max(matrix["pruned"], matrix.get("regrown", 0)) > matrix["size"]:
                    raise WrongStructure(f"{place}.{name} has more weights pruned or regrown than it has")
                if rebuilt and "regrown" not in matrix:
                    raise WrongStructure(f"{place}.{name} lacks regrown")
    shapes = {
        parse_map(each).shape
        for block in blocks
        for sub in block["sub_blocks"]
        for matrix in sub["matrices"].values()
        for each in matrix.get("outliers_pruned", {}).values()
    }
    if len(shapes) > 1:
        raise WrongStructure("the maps of outliers are of different sizes")
