"""Text in HTML and in Markdown: the one place where names, options and messages are escaped.

Whatever is composed into a page and is not `Html` is taken for text and escaped, so that forgetting to mark HTML shows
tags to the reader, and never runs somebody's script.
"""

import re
from collections.abc import Iterable

NOT_SHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that HTML does not allow, and halves of surrogate pairs, which UTF-8 does not."""


class Html(str):
    """Text that is HTML already. Made by the functions of this module, and by figures.py from matplotlib's SVG."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Escape text for HTML, for use between tags and in quoted attributes; `Html` is returned as it is."""
    if isinstance(text, Html):
        return text
    shown = NOT_SHOWN.sub("\ufffd", str(text))
    return Html(shown.translate({38: "&amp;", 60: "&lt;", 62: "&gt;", 34: "&quot;", 39: "&#39;"}))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Join parts, each escaped unless it is `Html`."""
    return Html(between.join(map(escape, parts)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """Compose an element `<name attributes>children</name>`; children that are not `Html` are escaped.

    Args:
        attributes: an underscore at the end of a name, as in `class_`, is dropped; None leaves the attribute out.
    """
    given = "".join(
        f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def markdown_text(text: object, begins_line: bool = False) -> str:
    """Escape text for Markdown: on one line, and without markup, links or HTML tags of its own.

    The names and numbers of ordinary runs come out as they are: underscores and dots within words mean nothing.

    Args:
        begins_line: whether it stands at the beginning of a line, where it could be a heading, a list or a rule.
    """
    line = NOT_SHOWN.sub("\ufffd", " ".join(str(text).split()))
    line = re.sub(r"([\\`*\[\]|<>~$])", r"\\\1", line)
    # At the edge of a word an underscore is emphasis; in front of a letter or # an ampersand is an entity.
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    line = re.sub(r"&(?=[#\w])", r"\\&", line)
    if begins_line:
        line = re.sub(r"^(#|[-+=]|\d+[.)](?=\s|$))", lambda found: f"{found[1][:-1]}\\{found[1][-1]}", line)
    return line


def markdown_code(text: object) -> str:
    """Text as a code span, which no backticks within the text can end."""
    line = NOT_SHOWN.sub("\ufffd", " ".join(str(text).split()))
    ticks = "`" * (_longest_ticks(line) + 1)
    padded = f" {line} " if line.startswith("`") or line.endswith("`") or not line else line
    return f"{ticks}{padded}{ticks}"


def markdown_block(text: str, language: str) -> str:
    """Text as a fenced block of code, which nothing within the text can end."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{NOT_SHOWN.sub(chr(0xFFFD), text)}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
