"""The structure of recover.json, checked as a whole when it is read, as record_check.py does for run.json."""

from itertools import pairwise
from typing import Any

from barber_jax.console.structure import (
    WrongStructure,
    fields,
    integer,
    items,
    mapping,
    number,
    optional,
    scalar,
    text,
)
from barber_jax.reports.record_check import DEVICE, FRACTION, LOSS, MEASURED, MODEL, SECONDS

WRITTEN = ("best", "last")
"""Which weights a recovery may write."""

_OPTION_KINDS = {"ckpt": text, "out": text}
_KNOWN_OPTIONS = {
    "teacher": optional(text),
    "scope": optional(text),
    "mix": optional(FRACTION),
    "rank": optional(integer()),
    "seed": integer(),
    "length": integer(1),
    "compute_dtype": text,
}
"""Options that reports and studies put into words."""


def _option(value: Any, place: str) -> None:
    """A scalar, or a list of them where an option takes several."""
    (items(scalar) if isinstance(value, list) else scalar)(value, place)


def _options(value: Any, place: str) -> None:
    fields(_OPTION_KINDS, _KNOWN_OPTIONS)(value, place)
    mapping(_option)(value, place)


def _written(value: Any, place: str) -> None:
    if value not in WRITTEN:
        raise WrongStructure(f"{place} is missing or not one of {', '.join(WRITTEN)}")


def _any_object(value: Any, place: str) -> None:
    fields({})(value, place)


_STEP = fields(
    {
        "step": integer(1),
        "loss": LOSS,
        "kl": optional(number(finite=False)),
        "cross_entropy": LOSS,
        "gradient_norm": LOSS,
        "rate": number(0),
    }
)
_EVALUATION = fields(
    {
        "step": integer(),
        "loss": LOSS,
        "kl": optional(number(finite=False)),
        "cross_entropy": LOSS,
        "seconds": SECONDS,
    }
)
RECORD = fields(
    {
        "options": _options,
        "commands": fields({"recover": items(text), "prune": optional(items(text))}),
        "versions": fields({"barber_jax": text}),
        "device": DEVICE,
        "processes": integer(1),
        "model": MODEL,
        "source": fields(
            {"checkpoint": text, "run": optional(_any_object)},
            {"recovered": optional(fields({"steps": integer(), "tokens": integer(), "seconds": SECONDS}))},
        ),
        "sparsity": FRACTION,
        "pattern": text,
        "steps": integer(),
        "tokens": integer(),
        "tokens_per_step": integer(1),
        "training": items(_STEP),
        "evaluations": items(_EVALUATION),
        "best_step": integer(),
        "written": _written,
        "movement": items(fields({"block": integer(), "weights": mapping(LOSS, least=1)})),
        "seconds": SECONDS,
        "seconds_training": SECONDS,
        "tokens_per_second": number(0),
        "operations_per_token": number(0),
        "peak_memory": mapping(integer()),
    },
    {
        "matmul_flops": optional(number(0)),
        "share_of_peak": optional(number(0)),
        "dense_perplexity": optional(MEASURED),
        "start_perplexity": optional(MEASURED),
        "perplexity": optional(MEASURED),
    },
)


def check_recover_record(record: dict) -> None:
    """Check recover.json: kinds of all values but those of `source.run`, and what they must have in common.

    Raises:
        WrongStructure: the message names the first place that is wrong.
    """
    RECORD(record, "")
    mapping(text)(record["versions"], "versions")
    for part in ("training", "evaluations"):
        steps = [each["step"] for each in record[part]]
        if any(one >= other for one, other in pairwise(steps)):
            raise WrongStructure(f"{part} is not in the order of its steps")
        if steps and steps[-1] > record["steps"]:
            raise WrongStructure(f"{part} goes beyond the last step")
        if len({each["kl"] is None for each in record[part]}) > 1:
            raise WrongStructure(f"{part} has kl in some entries only")
    evaluated = {each["step"] for each in record["evaluations"]}
    if evaluated and record["best_step"] not in evaluated:
        raise WrongStructure("best_step is not among the evaluations")
    for index, each in enumerate(record["movement"]):
        if each["weights"].keys() != record["movement"][0]["weights"].keys():
            raise WrongStructure(f"movement[{index}] has other matrices than the first block")
