"""A pytest plugin that accelerates every AutoencoderKL of diffusers when it is constructed.

For tests that know nothing of fastvae, diffusers' own above all: what they assert of a stock model must hold as well.
``python -m pytest -p swap_in.everywhere <files>``, with this folder's parent on the path; make test-diffusers does it.
"""

import functools

import diffusers

import fastvae
from fastvae.fast.fast_path import FastPath

COUNTS = {"models": 0, "calls": 0}


def accelerate_at_construction(kind):
    """Make a class accelerate each new instance; return a function that undoes it."""
    stock = kind.__init__

    # wraps keeps signature and names, from which diffusers makes configs.
    @functools.wraps(stock)
    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        fastvae.accelerate(self)
        COUNTS["models"] += 1

    def undo():
        kind.__init__ = stock

    kind.__init__ = init
    return undo


def count_calls():
    """Count calls of encoders and decoders that reach the fast path; return a function that undoes it."""
    run = FastPath.run

    def counted(self, part, x):
        COUNTS["calls"] += 1
        return run(self, part, x)

    def undo():
        FastPath.run = run

    FastPath.run = counted
    return undo


def pytest_configure(config):
    for undo in (accelerate_at_construction(diffusers.AutoencoderKL), count_calls()):
        config.add_cleanup(undo)


def pytest_terminal_summary(terminalreporter):
    """Print the counts, because a suite that builds no model passes as well."""
    terminalreporter.write_line(
        "fastvae: {models} models accelerated at construction, {calls} calls on the fast path".format(**COUNTS)
    )
