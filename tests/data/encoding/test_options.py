"""The options of encode and repair: each argument reaches the field of its name, and a wrong value is refused."""

from dataclasses import fields

import pytest

from fastvae.data.encoding import encode, repair
from fastvae.data.encoding.options import LatentOptions, RunOptions

LATENTS = {
    "buckets": "sdxl",
    "crop": "random",
    "variants": 3,
    "flip": True,
    "seed": 5,
    "dtype": "bf16",
    "posterior": "sample",
    "store_dtype": "fp32",
    "logvar": "u8",
    "alpha": "mask",
    "animated": "skip",
    "min_size": 7,
    "no_upscale": True,
}
SHARED = {
    "device": "cpu",
    "batch": 2,
    "workers": 3,
    "max_failures": 4,
    "max_pixels": 5,
    "deterministic": True,
    "retry_failed": True,
    "progress": False,
}
OF_ENCODE = {"on_error": "fail", "hash": "full", "shard_mb": 6, "commit_seconds": 7}


def values(options) -> dict:
    return {field.name: getattr(options, field.name) for field in fields(options)}


@pytest.mark.parametrize(
    ("module", "arguments", "wanted"),
    [
        (encode, ("in", "out"), [LATENTS, {**SHARED, **OF_ENCODE}]),
        (
            repair,
            ("out",),
            [{**SHARED, "on_error": "quarantine", "hash": "none", "shard_mb": 256, "commit_seconds": 60}],
        ),
    ],
    ids=["encode", "repair"],
)
def test_an_argument_reaches_the_field_of_its_name(module, arguments, wanted, monkeypatch):
    made = []

    def stop(kind):
        def make(*given, **named):
            made.append(values(kind(*given, **named)))
            if kind is RunOptions:
                raise InterruptedError

        return make

    for kind in (LatentOptions, RunOptions):
        monkeypatch.setattr(module, kind.__name__, stop(kind), raising=False)
    given = {"vae": "tiny", **LATENTS, **SHARED, **OF_ENCODE} if module is encode else SHARED
    with pytest.raises(InterruptedError):
        getattr(module, module.__name__.rsplit(".", 1)[1])(*arguments, **given)
    assert made == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("commit_seconds", -1),
        ("shard_mb", 0),
        ("shard_mb", float("inf")),
        ("batch", 0),
        ("workers", 1025),
        ("hash", "md5"),
    ],
)
def test_a_wrong_value_of_the_run_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        RunOptions(**{**SHARED, name: value})


@pytest.mark.parametrize(("name", "value"), [("crop", "left"), ("variants", 0), ("seed", -1), ("logvar", "u4")])
def test_a_wrong_value_of_the_latents_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        LatentOptions(**{**LATENTS, name: value})
