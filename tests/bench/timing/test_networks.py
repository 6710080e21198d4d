"""Contestants of a network: a wrong, missing or absent one has its reason and no call that could be timed."""

import pytest
import torch

from bench.timing import cases, networks
from bench.timing.contestants import EAGER, Job, LeftOut, Ready, eager


@pytest.fixture
def line(tmp_path):
    job = Job(cases.Network("encoder", cases.TINY, 4, dtype="float32"), torch.device("cpu"), tmp_path)
    line = networks.Line(job, [])
    line.admit(EAGER[0], eager)
    return line


def test_a_wrong_result_has_a_reason_and_no_call(line):
    def wrong(job):
        call = job.call(job.vae)
        return Ready(lambda x: call(x) + 1)

    line.admit("wrong", wrong)
    assert line.rows["wrong"].keys() == {"failed"}
    assert line.rows["wrong"]["failed"].startswith("AssertionError: largest error")
    assert line.calls.keys() == {EAGER[0]}, "the others are timed all the same"
    (failed,) = networks.failures({"contestants": line.rows})
    assert failed.startswith("wrong: AssertionError")


def test_an_error_is_red_and_a_choice_is_not(line):
    def missing(job):
        raise ModuleNotFoundError("No module named 'absent'")

    def left_out(job):
        raise LeftOut("takes part on a CPU")

    line.admit("missing", missing)
    line.admit("left out", left_out)
    assert line.rows["left out"] == {"left_out": "takes part on a CPU"}
    assert networks.failures({"contestants": line.rows}) == ["missing: ModuleNotFoundError: No module named 'absent'"]
    assert line.calls.keys() == {EAGER[0]}
