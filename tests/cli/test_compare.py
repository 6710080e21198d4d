"""fastvae compare as a user runs it: the table, the data, the page, its exit codes."""

import json
import re

import pytest
import torch.nn.functional as F
from click.testing import CliRunner
from support.small_store import picture, small_vae

from fastvae.cli.main import cli
from fastvae.fast.cpu import cpu_pass


@pytest.fixture(autouse=True)
def _small_check_pictures():
    """Replace the fixture of that name: here the generated pictures have their own sizes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    small_vae().save_pretrained(folder / "model")
    for number in range(2):
        picture(number, 40, 32).save(folder / f"{number}.png")
    return folder


def run(folder, *more, images=("0.png", "1.png"), code=0):
    words = ["compare", *(str(folder / name) for name in images), "--vae", str(folder / "model"), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*words, *map(str, more)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def test_the_table(folder):
    result = run(folder, "--dtype", "bf16")
    said = re.findall(r"^compare a (\w+) picture of \d+x\d+$", result.stderr, flags=re.MULTILINE)
    assert said == ["waves", "flat", "noisy", "large"]
    lines = result.stdout.splitlines()
    assert lines[0].endswith(": 2 images, bfloat16 on cpu; the largest, mean and cosine error of each pair")
    assert lines[2].startswith("encoder.conv_in ")
    assert re.fullmatch(r"round trip, PSNR: fast \S+ dB, eager \S+ dB, float64 \S+ dB", lines[-1])


def test_one_json_document_and_a_page_that_fetches_nothing(folder, tmp_path):
    result = run(folder, "--json", "--html", tmp_path / "page.html", "--dtype", "fp32")
    facts = json.loads(result.stdout)
    assert (facts["images"], facts["dtype"], facts["is_right"]) == (2, "float32", True)
    page = (tmp_path / "page.html").read_text()
    for stage in facts["stages"]:
        assert f'<th scope="row">{stage["name"]}</th>' in page
    assert "The error of every stage is at most twice eager" in page
    assert not re.search(r"https?://|<script|@import|url\(", page)


def test_a_fast_path_that_is_wrong_ends_in_code_1(folder, tmp_path, monkeypatch):
    own = cpu_pass.CpuPass.end
    monkeypatch.setattr(cpu_pass.CpuPass, "end", lambda self, part, flow: own(self, part, flow) * 1.01)
    result = run(folder, "--html", tmp_path / "page.html", "--dtype", "fp32", code=1)
    assert "TOO FAR" in result.stdout
    assert "<strong>The error of some stages is more than twice" in (tmp_path / "page.html").read_text()


def test_an_error_that_the_images_do_not_show_ends_in_code_1(folder, monkeypatch):
    """torch's GroupNorm in channels_last, which loses digits on flat and on large pictures."""

    def norm(layer, x, into):
        return F.silu(F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps))

    right = json.loads(run(folder, "--json", "--dtype", "fp32").stdout)
    assert right["generated"] == {"waves": [], "flat": [], "noisy": [], "large": []}
    monkeypatch.setattr("fastvae.fast.cpu.cpu_pass.group_norm_silu", norm)
    wrong = json.loads(run(folder, "--json", "--dtype", "fp32", code=1).stdout)
    assert wrong["is_right"] is False
    assert wrong["generated"]["large"]
    assert "large picture: TOO FAR in " in run(folder, "--dtype", "fp32", code=1).stdout


@pytest.mark.parametrize(
    ("more", "images", "code", "words"),
    [
        ((), (), 2, "Missing argument 'IMAGE...'"),
        ((), ("none.png",), 2, "does not exist"),
        ((), ("model/config.json",), 3, "config.json"),
        (("--device", "gpu"), ("0.png",), 2, "device must be one of this machine's"),
        (("--html", "/nowhere/page.html"), ("0.png",), 2, "html must be a file in a folder that is there"),
    ],
    ids=["no image", "no such file", "no image file", "no such device", "no such folder"],
)
def test_a_refused_argument_is_named(folder, more, images, code, words):
    assert words in run(folder, *more, images=images, code=code).stderr
