"""The tables of one device check, or of several side by side, in Markdown and HTML."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.eval.tables import Table, markdown
from barber_jax.reports.markup import Html, element, markdown_text
from barber_jax.reports.page import pairs, table

CHECK_FILE = "device_check.json"
FORMAT, VERSION = "barber_jax.device_check", 1
Checks = list[tuple[str, dict]]
"""Name and content of device_check.json of each check."""
Rows = dict[tuple[str, ...], list[str]]
"""First cells of a row -> one cell for each check."""


def read_check(path: Path) -> dict:
    """Read device_check.json.

    Raises:
        BarberError: it is damaged, or of another version.
    """
    try:
        content = documents.read(path)
        if (content["format"], content["version"]) == (FORMAT, VERSION):
            # The whole page, so that nothing in the file can fail later.
            markdown_page([(path.parent.name, content)])
            return content
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        pass
    raise BarberError(f"{path}: not a file that this version's barber_jax.eval.device_check wrote; check again")


def read_checks(folders: list[Path]) -> Checks:
    """Read several checks; folders with equal names are called by their paths. Raises as `read_check`."""
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [(label, read_check(folder / CHECK_FILE)) for label, folder in zip(labels, folders, strict=True)]


def describe(content: dict) -> str:
    """Device, driver and versions in one line."""
    environment = content["environment"]
    if not environment:
        return "no device was reached"
    device, versions = environment["device"], environment["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "python") if name in versions)
    driver = f", driver {environment['driver']}" if "driver" in environment else ""
    return f"{device['count']} x {device['kind']} ({device['platform']}){driver}; {libraries}"


def markdown_page(checks: Checks) -> str:
    """All tables in Markdown."""
    lines = [
        markdown_text(f"{name}: {describe(content)}; {content['shape']}", begins_line=True) for name, content in checks
    ]
    parts = [f"\n{title}\n\n{markdown(*rows)}" for title, rows in _tables(checks)]
    return "\n".join(lines + parts)


def page_parts(checks: Checks) -> Iterator[Html]:
    """HTML of the page's body, part by part."""
    yield element("h1", "Device check")
    yield pairs((name, f"{describe(content)}; {content['shape']}") for name, content in checks)
    for title, rows in _tables(checks):
        yield element("h2", title)
        yield table(*rows)


def _tables(checks: Checks) -> list[tuple[str, Table]]:
    """Title and table of everything that was measured for at least one check."""
    titles: dict[str, tuple[tuple[str, ...], Callable[[dict], Iterable]]] = {
        "Masks of the packaged model that agree with those of a CPU: all, and the least of a matrix": (
            ("precision", "setting"),
            _masks,
        ),
        "Steady block: seconds, rate, share of the matrix-product peak, peak memory of the process": (
            ("run",),
            _blocks,
        ),
        "Stages of the steady block: seconds": (("run", "stage"), _stages),
        "Forecast for the whole model, a calculation from the steady block": (("run",), _forecasts),
        "Matrix products": (("dtype", "precision"), _products),
        "Selection of half of the weights of the MLP's first linear, and of swaps": (
            ("granularity", "what", "selection"),
            _selections,
        ),
        "Attention": (("dtype", "tokens", "direction", "implementation"), _attentions),
        "Steps": (("part", "step"), _steps),
    }
    found = []
    for title, (head, rows_of) in titles.items():
        rows: Rows = {}
        for index, (_, content) in enumerate(checks):
            for key, cell in rows_of(content):
                rows.setdefault(key, [""] * len(checks))[index] = cell
        if rows:
            body = [[*key, *cells] for key, cells in rows.items()]
            found.append((title, ([*head, *(name for name, _ in checks)], body)))
    return found


def _part(content: dict, part: str) -> Iterator[tuple[str, dict]]:
    """Name and result of the steps of a part that gave something."""
    for step in content["steps"]:
        if step["part"] == part and step["result"]:
            yield step["name"], step["result"]


def _masks(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, result in _part(content, "masks"):
        for setting, entry in result["settings"].items():
            yield (name, setting), f"{entry['agreement']:.3%} ({entry['lowest_matrix']:.2%})"


def _blocks(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, result in _part(content, "speed"):
        steady, memory = result["steady"], result["peak_memory"]
        device = f"device {memory['device_bytes'] / 1e9:.1f} GB, " if "device_bytes" in memory else ""
        yield (
            (name,),
            f"{steady['seconds']:.2f} s, {steady['flops'] / 1e12:.3g} TFLOP/s, "
            f"{steady['fraction_of_peak']:.0%}, {device}host {memory['host_bytes'] / 1e9:.1f} GB",
        )


def _stages(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, result in _part(content, "speed"):
        for stage, seconds in result["blocks"][-1].items():
            yield (name, stage), f"{seconds:.3f}"


def _forecasts(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for entry in content["forecast"]:
        compiling = f"and {entry['compiling_seconds']:.0f} s to compile"
        yield (entry["name"],), f"{entry['seconds'] / 60:.1f} min for {entry['layers']} blocks, {compiling}"


def _kernels(content: dict, part: str) -> Iterator[dict]:
    for _, result in _part(content, "kernels"):
        yield from result.get(part, [])


def _timing(entry: dict) -> str:
    if "error" in entry:
        return entry["error"]
    rate = f", {entry['flops'] / 1e12:.3g} TFLOP/s" if "flops" in entry else ""
    return f"{1000 * entry['seconds']:.2f} ms{rate}"


def _products(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for entry in _kernels(content, "matrix_products"):
        yield (entry["dtype"], entry["precision"]), _timing(entry)


def _selections(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for entry in _kernels(content, "selection"):
        yield (entry["granularity"], entry["what"], entry["selection"]), _timing(entry)


def _attentions(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for entry in _kernels(content, "attention"):
        key = (entry["dtype"], str(entry["length"]), entry["direction"], entry["implementation"])
        yield key, _timing(entry)


def _steps(content: dict) -> Iterator[tuple[tuple[str, ...], str]]:
    for step in content["steps"]:
        yield (step["part"], step["name"]), f"{step['status']}, {step['seconds']:.0f} s {step['error']}".strip()
