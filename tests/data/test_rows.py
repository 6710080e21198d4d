"""Noise keys: their documented encoding, and the numbers that they refuse."""

import hashlib

import pytest

from fastvae.data.rows import noise_key


def test_noise_keys_have_the_documented_encoding():
    written = (
        b"fastvae noise 1\0" + bytes([7, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]) + b"caf\xc3\xa9.png"
    )
    expected = int.from_bytes(hashlib.sha256(written).digest()[:8], "little")
    assert noise_key(7, 259, "café.png", 2) == expected
    # This number must never change: stored draws and resumed runs depend on it.
    assert noise_key(0, 0, "000.png") == 13470992453623031481


def test_every_field_changes_a_noise_key_and_none_runs_into_the_next():
    parts = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (256, 0, "a", 0)]
    parts += [
        (0, 256, "a", 0),
        (0, 0, "a", 256),
        (0, 0, "a\0", 0),
        (0, 0, "", 97),
        (2**64 - 1, 2**64 - 1, "a", 2**32 - 1),
    ]
    assert len({noise_key(*part) for part in parts}) == len(parts)


def test_a_file_name_that_is_not_utf_8_has_the_noise_key_of_its_bytes():
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    assert noise_key(0, 0, name) != noise_key(0, 0, "\ufffd.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, "a"), r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
        ((2**64, 0, "a"), "seed must be"),
        ((True, 0, "a"), "seed must be"),
        ((0, 0.5, "a"), "epoch must be an integer"),
        ((0, 0, "a", 2**32), r"variant must be an integer from 0 to 2\^32 - 1"),
    ],
)
def test_noise_keys_refuse_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_key(*arguments)
