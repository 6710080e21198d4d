"""Python blocks of README and docs run as they are written: each is whole, with its own imports and names."""

import re
from pathlib import Path

import diffusers
import pytest
from support.small_store import picture, small_vae, write_store
from swap_in import tiny_pipelines

import fastvae

ROOT = Path(__file__).parents[2]
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
BLOCKS = {
    f"{page.name}:{number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name, tmp_path, monkeypatch):
    """In a folder with a store and a photograph; models of the Hub are replaced by models of random weights."""
    (tmp_path / "photographs").mkdir()
    write_store(tmp_path / "latents", {(32, 32): ["a.jpg", "b.jpg"]}, columns={"a.jpg": {"caption": "a"}, "b.jpg": {}})
    picture(0, 16, 16).save(tmp_path / "photo.jpg")
    picture(1, 300, 260).save(tmp_path / "photographs" / "a.jpg")
    (tmp_path / "photographs" / "a.txt").write_text("a picture")
    monkeypatch.chdir(tmp_path)
    model = lambda *given, **options: small_vae()  # noqa: E731
    monkeypatch.setattr(fastvae.AutoencoderKL, "from_pretrained", model)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *given, **options: tiny_pipelines.xl())
    # The sizes and the epochs of a reader, and not of a test.
    block = BLOCKS[name].replace("256, 256)", "32, 32)").replace("range(10)", "range(1)")
    block = block.replace("num_workers=4", "num_workers=0")
    exec(compile(block, name, "exec"), {})


def test_every_page_with_code_is_found():
    assert len(BLOCKS) >= 6
