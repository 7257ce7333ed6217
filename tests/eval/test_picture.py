"""The picture of the results: what it says, that it is up to date, and what a damaged file gives."""

import json
import re
from pathlib import Path

import pytest

from barber_jax.console.errors import BarberError
from barber_jax.eval import picture

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, SVG = DOCS / "results.json", DOCS / "results.svg"


def texts(svg):
    return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def changed(tmp_path, change):
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_committed_picture_is_up_to_date(tmp_path, capsys):
    out = tmp_path / "results.svg"
    picture.run([str(RESULTS), str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    first = out.read_bytes()
    picture.run([str(RESULTS), str(out)])
    assert out.read_bytes() == first
    drawn = texts(first.decode())
    assert drawn == texts(SVG.read_text(encoding="utf-8"))
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = [each["name"] for each in content["methods"] + content["groups"]]
    values = [f"{bar['mean']:.1f}" for group in content["groups"] for bar in group["bars"]]
    title = f"{content['model']}: {content['measure']}"
    assert drawn == sorted([title, content["note"], *names, *values])


def test_the_picture_has_no_background_and_no_date():
    svg = SVG.read_text(encoding="utf-8")
    assert 'width="720" height="260"' in svg and "<dc:date>" not in svg
    backgrounds = re.findall(r'<g id="patch_[12]">\s*<path [^>]*style="([^"]*)"', svg)
    assert len(backgrounds) == 2 and all("opacity: 0" in style or "fill: none" in style for style in backgrounds)


def test_every_figure_is_in_the_results():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    for group in content["groups"]:
        for bar in group["bars"]:
            sd = f" ± {bar['sd']:.2f}" if "sd" in bar else ""
            assert re.search(rf"(?<![\d.,]){bar['mean']:.2f}{sd}(?!\d)", text), (group["name"], bar)
    for section in content["source"]["figures"], content["source"]["commands"], content["source"]["setup"]:
        assert f"\n## {section}\n" in text


def test_a_bar_that_is_cut_off_says_so(tmp_path):
    svg = picture.draw(picture.read_picture(changed(tmp_path, lambda content: content.update(cut=150))))
    assert [text for text in texts(svg) if "cut" in text] == ["176.8 (cut)"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content.pop("groups"), "'groups' is missing"),
        (lambda content: content.update(version=2), "version"),
        (lambda content: content.update(groups=[]), "no bars"),
        (lambda content: content.update(methods=["wanda"]), "compare it"),
        (lambda content: content.update(cut=0), "cut is 0"),
        (lambda content: content["groups"][0]["bars"][0].update(mean="high"), "high"),
        (lambda content: content["groups"][0]["bars"][0].update(mean=float("nan")), "mean nan"),
        (lambda content: content["groups"][0]["bars"][0].update(method="other"), "'other'"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(BarberError, match=message) as caught:
        picture.run([str(path), str(tmp_path / "results.svg")])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "results.svg").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\ud800"])
def test_no_json_is_one_line(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(BarberError, match=r"results\.json"):
        picture.read_picture(path)
