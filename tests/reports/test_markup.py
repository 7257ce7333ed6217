"""Escaping: no page, card or table holds a tag or markup of a name, an option or a tensor."""

import ast
import functools
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recovered import recover_json

from barber_jax.eval import device_page
from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import Run, Windows
from barber_jax.eval.study_page import page_parts
from barber_jax.eval.tables import agreement_table, markdown, runs_table, seeds_table
from barber_jax.reports import markup, recover_page
from barber_jax.reports.figures import Plots, bars, heat, lines, stacked
from barber_jax.reports.markup import Html, element, escape, join, markdown_block, markdown_code, markdown_text
from barber_jax.reports.model_card import model_card
from barber_jax.reports.page import page, pairs, table
from barber_jax.reports.report_page import _sections

pytestmark = pytest.mark.usefixtures("drawn")

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></title></style></svg><b onclick='x'>",
    'a" onload="x" b=\' --><!-- ]]>&lt;i&gt;',
    "$\\frac{1}{0}$ and $\\badmacro$ $",
    "| a | `b` ``` \n# c [d](javascript:x) *e* _f_ \x00\x1b[31m\u202e",
)
"""Each is used as every name of a page at once."""


class Elements(HTMLParser):
    """Tags and attributes of a page, and its text without tags."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words = set(), set(), []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert not (value or "").lower().startswith("javascript:"), name

    def handle_comment(self, data):
        self.tags.add("!comment")

    def handle_decl(self, decl):
        self.tags.add(f"!{decl}")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def record(word):
    """A run.json in which every text is `word`."""
    matrix = {"size": 8, "pruned": 4, "regrown": 1}
    sub = {"name": word, "sparsity": 0.5, "swaps": 1, "loss_before": 2.0, "loss_after": 1.0, "matrices": {word: matrix}}
    options = {
        name: word for name in ("ckpt", "method", "masks", "sparse_ckpt", "granularity", "alpha", "metric", word)
    }
    options |= {"pattern": word, "compute_dtype": word, "out": word, "calibration": word}
    options |= {"rebuild": True, "refine": word, "reconstruct": word, "samples": word, "length": word, "seed": 0}
    measured = {"source": word, "perplexity": 9.5, "windows": word, "length": word}
    return {
        "options": {**options, "sparsity": 0.5},
        "versions": {"barber_jax": word, word: word},
        "device": {"platform": word, "kind": word, "count": word},
        "model": {"model_type": word, "blocks": word, "hidden": word},
        "blocks": [{"block": index, "sub_blocks": [sub], "seconds": {word: 1.0}} for index in range(2)],
        "totals": {"weights": 16, "pruned": 8, "sparsity": 0.5, "seconds_per_stage": {word: 1.0}, "swaps": 2}
        | {"loss_before": 4.0, "loss_after": 2.0, "seconds": 3.0},
        "peak_memory": {"host_bytes": 2**30},
        "perplexity": measured,
        "dense_perplexity": measured,
        "started_from": {"folder": word, "method": word, "rebuild": False, "seconds": 1.0},
    }


def report(word):
    outputs = {word: np.array([0.1, 0.2, 0.5, 0.6, 0.7])}
    return page(f"{word} - barber_jax", _sections(word, record(word), outputs))


def study_parts(word, reason):
    content = record(word)
    other = json.loads(json.dumps(content))
    other["options"]["seed"], other["options"]["pattern"] = 1, "plain"
    third = json.loads(json.dumps(other))
    third["options"]["seed"] = 2
    runs = [
        Run(word, None, each, {Windows(word, word, word): 9.5}, {word: 0.5, "mean": 0.5}, 3)
        for each in (content, other, third)
    ]
    for run, suffix in zip(runs, "abc", strict=True):
        run.name += suffix
    overlap = Overlap({word: 1}, {word: 2})
    sets = [] if reason else [(runs[0], runs[1], overlap, overlap), (runs[1], runs[2], overlap, None)]
    return runs, runs_table(runs), seeds_table(runs), sets, agreement_table(sets), reason


def study(word):
    return page(word, page_parts(*study_parts(word, None)))


def study_without_masks(word):
    return page(word, page_parts(*study_parts(word, f"{word} and {word} are of different models")))


def filled(value, word):
    """A copy of a document in which every text is `word`."""
    if isinstance(value, dict):
        return {key: filled(each, word) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, word) for each in value]
    return word if isinstance(value, str) else value


def recovered(word):
    """A recover.json in which every text is `word`."""
    content = filled(recover_json(), word) | {"written": "best"}
    content["source"] |= {"run": record(word), "recovered": {"steps": 3, "tokens": 4, "seconds": 1.0}}
    content["movement"] = [{"block": index, "weights": {word: 0.1, f"{word} ": 0.2}} for index in range(2)]
    for part in ("options", "versions"):
        content[part][word] = word
    return content


def recovery(word):
    return page(f"{word} - barber_jax", recover_page.sections(word, recovered(word)))


def device_check(word):
    return page("Device check", device_page.page_parts([(word, measured_device(word))]))


def measured_device(word):
    """A device_check.json with a row in every table, in which every text is `word`."""
    kernel = {"dtype": word, "precision": word, "granularity": word, "what": word, "selection": word, "length": word}
    kernel |= {"implementation": word, "direction": word, "seconds": 0.002}
    results = {
        "speed": {"steady": {"seconds": 2.0, "flops": 2e12, "fraction_of_peak": 0.5}}
        | {"blocks": [{word: 9.0}], "peak_memory": {"host_bytes": 10**9}},
        "masks": {"settings": {word: {"agreement": 0.9, "lowest_matrix": 0.8}}},
        "kernels": {
            part: [kernel, {**kernel, "error": word}] for part in ("attention", "matrix_products", "selection")
        },
    }
    step = {"name": word, "status": word, "seconds": 3.0, "error": word}
    return {
        "shape": word,
        "environment": {"device": {"platform": word, "kind": word, "count": word}, "driver": word}
        | {"versions": {"jax": word, "flax": word, "python": word}},
        "steps": [{**step, "part": part, "result": result} for part, result in results.items()],
        "forecast": [{"name": word, "layers": word, "seconds": 9.0, "compiling_seconds": 3.0}],
    }


QUOTED = {recovery: 11, device_check: 0}
"""Places of a page where a name is quoted for the shell, or where only the last part of a path is shown; else 3."""


@functools.cache
def plain_page(make):
    return Elements(make("plain"))


@pytest.mark.parametrize("make", [report, study, study_without_masks, recovery, device_check])
@pytest.mark.parametrize("word", EVIL, ids=range(len(EVIL)))
def test_no_page_holds_a_tag_of_a_name(make, word):
    content = make(word)
    plain, hostile = plain_page(make), Elements(content)
    assert hostile.tags <= plain.tags and hostile.attributes <= plain.attributes
    assert not {"script", "img", "b onclick"} & hostile.tags
    assert "\x00" not in content and "\x1b" not in content
    # The name is shown, letter by letter, in tables and in plots.
    shown = " ".join(markup.NOT_SHOWN.sub("\ufffd", word).split())
    assert hostile.text.count(shown) > 5 and hostile.text.count(shown) >= plain.text.count("plain") - QUOTED.get(
        make, 3
    )


@pytest.mark.parametrize("word", EVIL, ids=range(len(EVIL)))
def test_no_plot_reads_a_name_as_mathematics_or_markup(word):
    plots = Plots()
    for draw in (
        lines({word: [1.0, 100.0], f"{word} ": [3.0, 5.0]}, word, word, log=True),
        bars({word: 1.0}, word),
        stacked({word: [1.0]}, [word], word),
        heat(np.ones((1, 2)), [word], word, word),
    ):
        figure = plots.draw(draw, word)
        assert isinstance(figure, Html)
        seen = Elements(figure)
        assert not {"script", "img", "b", "i"} & seen.tags
        text = " ".join(markup.NOT_SHOWN.sub("\ufffd", word).split())
        assert seen.text.count(text) >= 3


def test_logarithmic_axes_have_plain_numbers():
    figure = Plots().draw(lines({"a": [0.001, 1000.0], "b": [1.0, 2.0]}, "x", "y", log=True), "title")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    assert {"0.001", "1", "1000"} <= {text.strip() for text in texts}
    assert "$" not in figure and "mathdefault" not in figure


def test_what_is_not_html_is_text():
    assert element("p", "<b>", element("i", "x")) == "<p>&lt;b&gt;<i>x</i></p>"
    assert element("p", class_="a\"b'", title=None) == '<p class="a&quot;b&#39;"></p>'
    # A part that is no longer `Html`, through an f-string for example, shows its tags instead of having them.
    assert join([element("b", "x"), f"{element('b', 'x')}"]) == "<b>x</b>&lt;b&gt;x&lt;/b&gt;"
    assert "&lt;b&gt;" in page("t", ["<b>"]) and "<p>x</p>" in page("t", [element("p", "x")])
    assert "<script" not in table(["<script>"], [["<script>"]]) + pairs([("<script>", "<script>")])


def test_halves_of_surrogate_pairs_are_replaced():
    for made in (escape("a\ud800b"), markdown_text("a\ud800b")):
        assert made == "a\ufffdb"
    assert markdown_code("a\ud800b") == "`a\ufffdb`"


@given(st.text())
def test_escaping_is_undone_by_a_parser(text):
    assert Elements(f"<p>{escape(text)}</p>").words in ([], [markup.NOT_SHOWN.sub("\ufffd", text)]) or "\r" in text
    assert escape(escape(text)) == escape(text)


@pytest.mark.parametrize("word", EVIL, ids=range(len(EVIL)))
def test_markdown_holds_no_markup_of_a_name(word):
    content = record(word)
    card = model_card(word, content, ["--ckpt", word], "")
    _, head, seeds, _, pairs_table, _ = study_parts(word, None)
    texts = [card, *(markdown(*each) for each in (head, seeds, pairs_table))]
    for text in texts:
        assert "\x00" not in text and "\x1b" not in text
        text.encode("utf-8")
    # A table has as many columns in every row, and every line is a row.
    for text in texts[1:]:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}
        assert len(columns) == 1
        assert not re.search(r"(?<!\\)[<`]", re.sub(r"\\\\", "", text))
    # Outside of code there is no tag, no link and no heading but our own.
    prose, code = [], []
    fence = None
    for line in card.partition("---\n\n")[2].splitlines():
        marker = re.match(r"(`{3,})(\w*)$", line)
        if fence is None and marker:
            fence = marker[1]
            code.append("")
        elif fence and line == fence:
            fence = None
        elif fence:
            code[-1] += line + "\n"
        else:
            prose.append(line)
    assert fence is None and len(code) == 3
    assert [line for line in prose if line.startswith("#")] == [f"# {markdown_text(word)}", "## Use"]
    spoken = re.sub(r"\\\\", "", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(prose)))
    assert not re.search(r"(?<!\\)<", spoken) and "](javascript" not in re.sub(r"\\.", "", spoken)
    # The commands and programs work as they stand.
    shown = markup.NOT_SHOWN.sub("\ufffd", word)
    assert shlex.split(code[0])[-2:] == ["--out", shown]
    if shown == word:
        (call,) = (node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Call))
        assert ast.literal_eval(call.args[0]) == word


def test_ordinary_names_stay_as_they_are():
    for name in ("llama-7b_50,alpha=0.1", "method=wanda,pattern=2-4", "model.layers.0.mlp.up_proj.weight", "a & b"):
        assert markdown_text(name) == name
    assert markdown_text("--alpha") == "--alpha" and markdown_text("- a", begins_line=True) == "\\- a"
    assert markdown_text("1. a", begins_line=True) == "1\\. a"
    assert markdown_code("a`b") == "``a`b``" and markdown_code("`") == "`` ` ``"
    assert markdown_block("a ``` b", "sh") == "````sh\na ``` b\n````"
