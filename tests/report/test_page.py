"""HTML report: one file, all text escaped, numbers and labels in place; test_browser.py opens it in a browser."""

import base64
import re
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
from report.examples import result, row

from fastvae.report.bar_chart import bars
from fastvae.report.number_format import interval, megabytes, number
from fastvae.report.page import check_extra, page

VOID = {"meta", "link", "source", "img"}


class Document(HTMLParser):
    """Tags with attributes, and the text; checks that tags are nested correctly."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_nothing_is_fetched_and_no_script_runs():
    text = page(result())
    document = Document(text)
    assert not document.all("script")
    assert not re.search(r"\b(?:https?:)?//|@import|url\(|javascript:", re.sub(r"data:[^\"]*", "", text))
    for tag, attributes in document.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
        assert not [name for name in attributes if name.startswith("on")]


def test_row_33_whatever_a_result_holds_is_text():
    document = Document(page(result()))
    assert "<script>alert(1)</script>" in document.text
    assert 'A "card" of <none>' in document.text
    assert "failed: g++ <missing> & co" in document.text


def test_the_figures_are_there_with_their_intervals():
    document = Document(page(result()))
    for words in ("80.0", "66.7 to 88.9", "12.5", "11.2 to 15.0", "3.20", "123", "0.012", "0.050 allowed"):
        assert words in document.text, words
    assert "Medians of 20 rounds in turns" in document.text
    assert "Times diffusers" in document.text
    assert "encoder.mid_block module HOOKS: a hook" in document.text
    assert "parameters 2,360,743" in document.text
    assert "gpu memory 80,000 MB" in document.text
    assert "These numbers were not measured." in document.text


def test_headings_table_headers_and_pictures_have_text():
    document = Document(page(result()))
    assert document.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in document.tags if tag in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * 5 + ["h3"] * 3
    assert all(header["scope"] in ("col", "row") for header in document.all("th"))
    assert len(document.all("caption")) == len(document.all("table")) == 3
    assert [image["alt"] for image in document.all("img")] == [
        "Bars of images per second: fastvae 80.0 (66.7 to 88.9), diffusers 25.0 (20.8 to 27.8).",
        "Bars of images per second: fastvae 32.0 (26.7 to 35.6), diffusers 25.0 (20.8 to 27.8).",
    ]


def test_a_reason_reaches_across_the_columns():
    for names, span in (((), 5), (("times_baseline", "error"), 3)):
        given = result()
        for case in given["cases"]:
            for one in case["rows"]:
                one.update(dict.fromkeys(names))
        document = Document(page(given))
        headers = len([th for th in document.all("th") if th["scope"] == "col"])
        assert {cell["colspan"] for cell in document.all("td") if "colspan" in cell} == {str(span)}
        assert headers == 2 * (span + 1) + 5


def test_memory_has_a_column_only_if_it_was_asked_for():
    given = result()
    given["cases"] = [{"name": "case", "rows": [row("fastvae", 10, memory_bytes=None)]}]
    assert "not measured" in Document(page(given)).text
    del given["cases"][0]["rows"][0]["memory_bytes"]
    assert "memory" not in Document(page(given)).text.replace("gpu memory", "")


def test_a_case_without_a_right_result_has_no_picture():
    given = result()
    given["cases"] = [{"name": "case", "rows": [{"contestant": "fastvae", "reason": "wrong: by 3"}]}]
    document = Document(page(given))
    assert "wrong: by 3" in document.text
    assert not document.all("img")


def test_title_and_rows_are_enough():
    document = Document(page({"title": "A", "cases": [{"name": "B", "rows": [{"contestant": "C"}]}]}))
    shown = "Medians, with their 95 % intervals."
    assert document.text == f"A A B {shown} Contestant Images/s ms a call C not measured"
    with pytest.raises(ValueError, match="results must have a title and cases, got none called 'cases'"):
        page({"title": "A"})


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"needs {missing}: pip install jinja2 matplotlib"):
        check_extra()


def test_bars_are_deterministic_svg_and_differ_by_scheme():
    rows = [row("fastvae", 10), row("diffusers", 40, images_per_second_interval=None)]
    light, dark = bars(rows), bars(rows, dark=True)
    assert light == bars(rows)
    assert light != dark
    assert xml.etree.ElementTree.fromstring(light).tag.endswith("svg")
    assert base64.b64encode(light.encode()).decode() in page({"title": "A", "cases": [{"name": "B", "rows": rows}]})


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, ""),
        (0, "0"),
        (0.000123, "0.00012"),
        (0.0123, "0.0123"),
        (1.0, "1.00"),
        (9.999, "10.00"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (float("nan"), "nan"),
    ],
)
def test_number_format(value, written):
    assert number(value) == written


def test_format_of_intervals_and_megabytes():
    assert (interval((1.0, 23.4)), interval(None)) == ("1.00 to 23.4", "")
    assert (megabytes(1_234_567_890), megabytes(0), megabytes(None)) == ("1,235", "0", "")
