"""HTML report in Chromium: no console messages, no requests, readable in light and dark, wide and narrow."""

import pytest
from report.browser import CHROMIUM, browsing
from report.examples import result

from fastvae.report.page import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

# The smallest contrast of a text with its background, by WCAG's formula.
CONTRAST = """
(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const ratio = node => {
    const [low, high] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const own = node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  return Math.min(...[...document.body.querySelectorAll("*")].filter(own).map(ratio));
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(result()), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report(browser, report, dark, width):
    browser.open(report, width=width, dark=dark)
    assert browser.messages() == []
    assert browser.requested() == [report.as_uri()]
    assert browser.ask("document.images.length") == 2
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
    # Tables scroll; the page does not scroll sideways.
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(CONTRAST) >= 4.5
    background = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")


def test_each_scheme_has_a_picture(browser, report):
    shown = []
    for dark in (False, True):
        browser.open(report, dark=dark)
        shown.append(browser.ask("document.images[0].currentSrc"))
    assert shown[0] != shown[1]
    assert browser.screenshot().startswith(b"\x89PNG")


def test_tables_and_pictures_have_accessible_names(browser, report):
    browser.open(report)
    nodes = [node for node in browser.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes}
    roles = [node["role"]["value"] for node in nodes]
    assert ("heading", "encode 2 x 256x256") in named
    assert ("columnheader", "Images/s") in named
    assert ("rowheader", "fastvae") in named
    assert ("image", "Bars of images per second: fastvae 80.0 (66.7 to 88.9), diffusers 25.0 (20.8 to 27.8).") in named
    assert roles.count("table") == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script>console.error('no')</script>", "console.error"),
        ("<script>nothing()</script>", "Uncaught"),
        (
            "<meta http-equiv=Content-Security-Policy content=\"img-src 'none'\"><img src=a.png>",
            "Content Security Policy",
        ),
    ],
    ids=["console", "exception", "policy"],
)
def test_console_messages_are_seen(browser, tmp_path, body, message):
    path = tmp_path / "page.html"
    path.write_text(body)
    browser.open(path)
    assert message in " ".join(browser.messages())


def test_requests_are_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text("<img src='picture.png'>")
    browser.open(tmp_path / "page.html")
    assert browser.requested() == [(tmp_path / name).as_uri() for name in ("page.html", "picture.png")]
    assert browser.messages() != []
