"""The command line as a process: its start, its streams when they are full or closed, names on a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import encode, run
from support.forks import CLOSED
from support.small_store import SIDE, picture

from fastvae.system.terminal import strip_control_characters

ROOT = Path(__file__).parents[2]


def test_row_33_names_cannot_drive_the_terminal(model, tmp_path):
    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "in" / "x.png")
    os.rename(tmp_path / "in" / "x.png", tmp_path / "in" / "a\x1b[31mred\x07.png")
    (tmp_path / "in" / "b\x1b]0;title\x07.png").write_bytes(b"")
    result = encode(tmp_path / "in", tmp_path / "out", model, "--max-failures", 1)
    assert "\x1b" not in result.output
    result = encode(tmp_path / "in", tmp_path / "strict", model, "--on-error", "fail", code=3)
    assert "\x1b" not in result.output
    shown = run("decode", tmp_path / "out", tmp_path / "png").output
    assert "\x1b" not in shown
    assert "a?[31mred?.png" in shown
    assert strip_control_characters("café ‮x\n") == "café ?x\n"


def test_as_a_process_without_torch_for_help(forks, pictures, model, tmp_path):
    """python -m fastvae: help is light, a run works, and a wrong one is one line on stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    probe = (
        "import sys, runpy; sys.argv = ['fastvae', 'encode', '--help']\n"
        "try: runpy.run_module('fastvae', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'PIL', 'tqdm', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "fastvae", "encode", pictures, tmp_path / "out", "--vae", model]
    done = subprocess.run(
        [*command, "--buckets", str(SIDE), "--json", "-q"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] == 4
    assert done.stderr == ""
    done = forks.fastvae(*command[3:], "--buckets", "7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastvae: buckets must be a multiple of the model's 8 pixels, got 7 in '7'\n"


def test_a_closed_pipe_is_exit_code_141(forks, pictures, model, tmp_path):
    """As with `| head -1`: the other end of the pipe is closed when the report comes."""
    encode(pictures, tmp_path / "out", model)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = forks.fastvae("info", tmp_path / "out", "-q", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_stdout_is_no_full_store_and_a_full_stderr_is_no_error(forks, pictures, model, tmp_path):
    options = ["--vae", model, "--buckets", SIDE, "--dtype", "fp32"]
    with open("/dev/full", "w") as full:
        done = forks.fastvae("encode", pictures, tmp_path / "out", *options, stdout=full)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("fastvae: the work is done, but its report could not be written")
        done = forks.fastvae("encode", pictures, tmp_path / "other", *options, stderr=full)
        assert (done.returncode, done.stdout.split(" ok")[0]) == (0, "done    4")
        done = forks.fastvae("info", tmp_path / "nothing", stderr=full)
        assert done.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor before the program starts")
def test_a_closed_stderr_stops_nothing(forks, pictures, model, tmp_path):
    options = ["--vae", model, "--buckets", SIDE, "--dtype", "fp32"]
    done = forks.fastvae("encode", pictures, tmp_path / "out", *options, stderr=CLOSED)
    assert (done.returncode, done.stdout.split(" ok")[0]) == (0, "done    4")
