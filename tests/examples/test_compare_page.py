"""The Gradio page in a real browser: a picture goes in, three come out, and the console stays silent."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from report.browser import CHROMIUM, browsing
from support.small_store import picture, small_vae

import fastvae

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not there: make test-doors"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    small_vae().save_pretrained(folder / "vae")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "page.log"
    # As a user starts it: without the tests' interpreter, which takes minutes for a picture.
    settings = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, ROOT / "examples" / "compare_page.py", "--vae", folder / "vae", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=settings)
    try:
        _wait(lambda: "Running on local URL" in log.read_text(), lambda: log.read_text())
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


def _wait(reached, otherwise=lambda: ""):
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def _choose(browser, path):
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    field = browser.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


SHOWN = "[...document.images].filter(i => i.complete && i.naturalWidth == 48 && i.naturalHeight == 40).length"
TEXT = "document.body.innerText"


def test_a_picture_goes_there_and_back(browser, address, tmp_path):
    picture(0, width=48, height=40).save(tmp_path / "picture.png")
    browser.visit(address)
    _wait(lambda: browser.ask("!!document.querySelector('input[type=file]')"))
    _choose(browser, tmp_path / "picture.png")
    _wait(lambda: browser.ask(SHOWN) == 1)
    browser.ask("document.querySelector('#start').click()")
    _wait(lambda: browser.ask(SHOWN) == 4, lambda: browser.ask(TEXT))
    figures = browser.ask(TEXT)
    # Random weights: what counts is that both ways give the same picture, and a poor one.
    assert float(re.search(r"Between the two: ([\d.]+|inf) dB", figures)[1]) > 50
    assert re.findall(r"^(\w+)\s+\d+\s+\d+\s+[\d.]+$", figures, re.MULTILINE) == ["eager", "fastvae"]
    # Gradio itself warns "Method not implemented."; errors and exceptions are another matter.
    assert set(browser.complaints()) <= {"console.warning"}
    hosts = {re.match(r"\w+:(//[^/]*)?", url)[0] for url in browser.requested()}
    assert {host for host in hosts if not host.startswith("blob:")} == {address.rstrip("/")}


def test_a_picture_that_is_missing_or_too_small_is_refused_in_words(browser, address, tmp_path):
    browser.visit(address)
    _wait(lambda: browser.ask("!!document.querySelector('#start')"))
    browser.ask("document.querySelector('#start').click()")
    _wait(lambda: "choose a picture first" in browser.ask(TEXT), lambda: browser.ask(TEXT))
    picture(0, width=7, height=40).save(tmp_path / "narrow.png")
    _choose(browser, tmp_path / "narrow.png")
    _wait(lambda: browser.ask("[...document.images].some(i => i.complete && i.naturalWidth == 7)"))
    browser.ask("document.querySelector('#start').click()")
    _wait(lambda: "at least 8 x 8 pixels, got 7 x 40" in browser.ask(TEXT), lambda: browser.ask(TEXT))


def test_one_of_the_two_is_accelerated_and_the_other_is_not(example):
    stock = small_vae()
    fast = example("compare_page").accelerated_copy(stock)
    assert fastvae.explain(fast).rows
    with pytest.raises(ValueError, match="is not accelerated"):
        fastvae.explain(stock)
    assert all(map(torch.equal, fast.parameters(), stock.parameters()))
