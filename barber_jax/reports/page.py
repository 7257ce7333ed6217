"""HTML of report pages: a self-contained document for light and dark colour schemes, desktop and phone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from barber_jax.console.errors import BarberError
from barber_jax.reports.markup import Html, element, join

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#c9d0d7;--card:#f5f7f9;
--s0:#2463b4;--s1:#c2570c;--s2:#2f7d4f;--s3:#8a3fa0;--s4:#a8324a;--s5:#6b7280}
@media (prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e4e8ec;--soft:#9aa5b1;--line:#3b444e;--card:#1c2229;
--s0:#6ea8f0;--s1:#f0a05a;--s2:#6cc795;--s3:#cf92e3;--s4:#f08a9e;--s5:#a3adb8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .6rem}
p{margin:.4rem 0;max-width:60rem}.soft{color:var(--soft)}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:1rem 0}
.numbers div{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.numbers b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.numbers span{color:var(--soft);font-size:.85rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0;background:var(--card);border-radius:.5rem;padding:.6rem;overflow-x:auto}
figure svg{display:block;width:100%;height:auto}figure.wide{grid-column:1/-1}
@media (max-width:40rem){figure.wide svg{width:44rem}}
figcaption{color:var(--soft);font-size:.85rem;margin-top:.3rem;position:sticky;left:0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem;margin:.5rem 0}
pre{background:var(--card);border-radius:.5rem;padding:.6rem .8rem;overflow-x:auto;font-size:.85rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""


def page(title: str, parts: Iterable[object]) -> str:
    """Compose an HTML document from the parts of its body; those that are not `Html` are escaped as text."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        # An empty icon: without one, browsers request favicon.ico.
        "<link rel='icon' href='data:,'>"
        f"{element('title', title)}<style>{STYLE}</style></head><body>\n{join(parts, chr(10))}\n</body></html>\n"
    )


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Compose a table."""

    def line(kind: str, row: Sequence[object]) -> Html:
        return element("tr", *(element(kind, cell) for cell in row))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", head)), body), class_="scroll")


def numbers(values: Iterable[tuple[str, str]]) -> Html:
    """Compose a row of key figures, given as (value, label)."""
    boxes = (element("div", element("b", value), element("span", name)) for value, name in values)
    return element("div", *boxes, class_="numbers")


def pairs(values: Iterable[tuple[str, object]]) -> Html:
    """Compose a list of names and values."""
    return element(
        "dl", *(element(kind, text) for pair in values for kind, text in zip(("dt", "dd"), pair, strict=True))
    )


def commands(lines: Iterable[str]) -> Html:
    """Compose a block of command lines."""
    return element("pre", "\n".join(lines))


def plots(figures: Iterable[Html]) -> Html:
    """Compose a grid of figures."""
    return element("div", *figures, class_="plots")


def soft(text: str) -> Html:
    """Compose a paragraph in a soft colour."""
    return element("p", text, class_="soft")


def try_writing(write: Callable[[], Any], out: Path, say: Callable[[str], None]) -> None:
    """Write report.html. If a plot cannot be drawn, only print a line, so that the run's result is not lost.

    Args:
        write: writes it.
        out: final name of the output folder.
        say: prints a line.

    Raises:
        BarberError: the report cannot be written to disk.
    """
    try:
        write()
    except BarberError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        say(f"report.html could not be written ({reason}); to retry, run python -m barber_jax.report {out}")
