"""Parsers of files of others, on damaged files, arbitrary bytes and arbitrary JSON; make fuzz runs for minutes."""

import json
import os
import random

import pytest
from fuzz.parsers import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# make fuzz sets thousands.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
TEXTUAL = [name for name, (_, seeds) in TARGETS.items() if seeds[0][:1] == b"{" and b"\0" not in seeds[0]]
ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "512x512", "\ud800", [], {}, [[]], [0, 0]]
)
JSON = st.recursive(
    ODD,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
)
NUMBERS = (b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x80", b"9" * 8, b'":[{"":0')
INSERTED = (b"\0", b"\n", b"-", b"NaN", b"\xed\xa0\x80", b"[" * 200, b"1e999", b"\\ud800")


def mutated(data: bytes, generator: random.Random) -> bytes:
    """``data`` with a few bytes flipped, removed, doubled or overwritten by extreme numbers."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(changed) + 1)
        way = generator.randrange(5)
        if way == 0 and changed:
            changed[at % len(changed)] ^= 1 << generator.randrange(8)
        elif way == 1:
            del changed[at : at + generator.choice((1, 2, 8, 64))]
        elif way == 2:
            changed[at:at] = changed[at : at + generator.choice((1, 8, 64))]
        elif way == 3:
            changed[at : at + 8] = generator.choice(NUMBERS)
        else:
            changed[at:at] = generator.choice(INSERTED)
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_changed_files_raise_only_the_named_errors(name, generator):
    target, seeds = TARGETS[name]
    target(mutated(generator.choice(seeds), generator))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_any_bytes_raise_only_the_named_errors(name, data):
    TARGETS[name][0](data)


@pytest.mark.parametrize("name", TEXTUAL)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_at_any_place_of_json_raises_only_the_named_errors(name, data):
    """Valid files of which one value, anywhere, is replaced or removed."""
    target, seeds = TARGETS[name]
    lines = [json.loads(line) for line in (seeds[0].splitlines() if name in ("plan", "manifest") else [seeds[0]])]
    inside = data.draw(st.sampled_from(lines))
    while True:
        place = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        deeper = inside[place]
        if not isinstance(deeper, dict | list) or not deeper or data.draw(st.booleans()):
            break
        inside = deeper
    if isinstance(inside, dict) and data.draw(st.integers(0, 4)) == 0:
        del inside[place]
    else:
        inside[place] = data.draw(JSON)
    target("\n".join(map(json.dumps, lines)).encode())


def test_other_errors_pass_through_a_target():
    """So the other tests of this file can fail."""
    with pytest.raises((TypeError, AttributeError)):
        TARGETS["config"][0]("no bytes")
