"""Tables of sizes, the bucket of an image, and its crop."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.small_store import picture

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, preprocess_identity, scaled_size, to_bucket
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import LARGEST_ASPECT, SMALLEST_SIDE, Picture, check_size
from fastvae.data.rows import parse_size, size_name

TABLES = {name: Buckets.parse(name, 8) for name in ("sdxl", "flux", "sdxl@256", "flux@128", "512")}


def test_the_built_in_tables():
    sdxl, flux = TABLES["sdxl"].sizes, TABLES["flux"].sizes
    assert (len(sdxl), len(flux)) == (41, 17)
    assert all(side % 64 == 0 for size in sdxl for side in size)
    # Sides are multiples of 64, and areas within 10 % of 1024².
    assert all(0.9 * 2**20 <= height * width <= 2**20 for height, width in sdxl)
    for sizes in (sdxl, flux):
        assert sorted(sizes) == sorted((width, height) for height, width in sizes)
        assert (1024, 1024) in sizes
    assert (sdxl[0], sdxl[-1], flux[0]) == ((512, 2048), (2048, 512), (672, 1568))


def test_a_scaled_table_keeps_its_aspect_ratios():
    small = TABLES["sdxl@256"].sizes
    assert small == tuple((height // 4, width // 4) for height, width in TABLES["sdxl"].sizes)
    rounded = Buckets.parse("sdxl@100", 16).sizes
    assert all(side % 16 == 0 for size in rounded for side in size)
    assert len(set(rounded)) == len(rounded) < 41


def test_sizes_are_multiples_of_the_models_pixels():
    assert Buckets.parse("flux", 16).sizes == TABLES["flux"].sizes
    with pytest.raises(ValueError, match="buckets must be a multiple of the model's 32 pixels, got 688 in 'flux'"):
        Buckets.parse("flux", 32)


@pytest.mark.parametrize("side", [256, 384, 512, 768, 1000, 1024, 1536])
def test_sizes_of_scaled_tables_are_multiples_that_the_denoiser_takes(side):
    """Of flux@512, 12 of 17 sizes were multiples of 8 alone, which no 2x2 patch of latents divides."""
    for name, denoiser in (("flux", 1), ("flux", 16), ("sdxl", 16)):
        sizes = Buckets.parse(f"{name}@{side}", 8, denoiser).sizes
        assert all(length % 16 == 0 for size in sizes for length in size)
        # Every size is the nearest multiple of 16.
        plain = Buckets.parse(name, 8).sizes
        assert set(sizes) == {tuple(math.floor(length * side / 1024 / 16 + 0.5) * 16 for length in s) for s in plain}
    assert Buckets.parse(f"sdxl@{side}", 8, 8).sizes == Buckets.parse(f"sdxl@{side}", 8, None).sizes
    assert sum(h % 16 + w % 16 > 0 for h, w in Buckets.parse("flux@512", 8, None).sizes) == 12


def test_a_table_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"sizes": [[64, 128], [96, 96]]}))
    assert Buckets.parse(path, 8).sizes == Buckets.parse(str(path), 8).sizes == ((64, 128), (96, 96))
    assert Buckets.parse(f"{path}@48", 8).sizes == ((32, 64), (48, 48))  # without "side": the root of the largest area
    path.write_text(json.dumps({"side": 64, "sizes": [[64, 128], [96, 96]]}))
    assert Buckets.parse(f"{path}@32", 8).sizes == ((32, 64), (48, 48))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"sizes": []}', '{"sizes": [[8]]}', '{"sizes": [[8, "8"]]}', '{"sizes": [[8, true]]}',
     '{"sizes": [[8, -8]]}', '{"sizes": 3}', '{"sizes": [[8, 8]], "side": "x"}', '{"sizes": [[8, 8], [8, 8]]}',
     '{"sizes": [[8, 65544]]}', '{"sizes": [[12, 8]]}', "[" * 100_000],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="buckets"):
        Buckets.parse(tmp_path / "x.json", 8)


@pytest.mark.parametrize("spec", ["256x512", "sd", "-8", "٢٥٦", 12, 0, 4, "65544", "9" * 30, "sdxl@", "sdxl@x", "@64"])
def test_a_spec_that_names_no_table_is_refused(spec):
    with pytest.raises(ValueError, match="buckets must be"):
        Buckets.parse(spec, 8)


@given(st.sampled_from(sorted(TABLES)), st.integers(1, 20_000), st.integers(1, 20_000), st.booleans())
def test_row_11_any_size_is_refused_by_name_or_covers_the_nearest_bucket(name, height, width, flip):
    small, thin = min(width, height) < SMALLEST_SIDE, max(width, height) > LARGEST_ASPECT * min(width, height)
    if small or thin:
        with pytest.raises(ImageError) as refused:
            check_size(width, height, "x", 20_000**2)
        assert refused.value.reason == ("too_small" if small else "too_thin")
        return
    check_size(width, height, "x", 20_000**2)
    table = TABLES[name]
    size = table.nearest((height, width))
    away = {other: abs(math.log(height / width) - math.log(other[0] / other[1])) for other in table.sizes}
    assert away[size] <= min(away.values()) * (1 + 1e-9) + 1e-12  # rounding of logarithms in float64
    scaled = scaled_size((height, width), size)
    assert scaled[0] >= size[0]
    assert scaled[1] >= size[1]
    assert scaled[0] == size[0] or scaled[1] == size[1]
    free = (scaled[0] - size[0], scaled[1] - size[1])
    for variant in range(4):
        top, left = Variants("random", 2, flip).corner("key", variant, free)
        assert 0 <= top <= free[0]
        assert 0 <= left <= free[1]


def test_a_tie_goes_to_the_larger_area_and_then_to_the_first():
    assert Buckets("x", ((64, 64), (128, 128), (32, 32))).nearest((50, 50)) == (128, 128)
    assert Buckets("x", ((64, 128), (128, 64))).nearest((90, 90)) == (64, 128)
    assert Buckets("x", ((128, 64), (64, 128))).nearest((90, 90)) == (128, 64)


def test_the_centre_crop_of_an_oblong_bucket():
    image = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80).astype(np.uint8)).convert("RGB")
    pixels, crop = to_bucket(Picture(image, (60, 80)), (60, 40))
    assert crop == (0, 20, 60, 40)
    assert np.array_equal(pixels, np.asarray(image)[:, 20:60])
    pixels, crop = to_bucket(Picture(image, (60, 80)), (24, 80))
    assert crop == (18, 0, 24, 80)
    assert np.array_equal(pixels, np.asarray(image)[18:42])


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_a_mirrored_variant_is_the_same_crop_mirrored(crop):
    drawn = Picture(picture(1, 75, 50), (50, 75))
    variants = Variants(crop, 2, True, 7)
    for number in range(2):
        plain, where = to_bucket(drawn, (32, 40), variants, 2 * number, "a")
        mirrored, there = to_bucket(drawn, (32, 40), variants, 2 * number + 1, "a")
        assert np.array_equal(mirrored, plain[:, ::-1])
        assert there[1] == 48 - 40 - where[1]  # in the mirrored image, 48 wide


def test_random_crops_depend_on_seed_key_and_number_and_reach_both_ends():
    variants = Variants("random", 3, False, 5)
    assert variants.corner("a", 1, (9, 99)) == Variants("random", 2, False, 5).corner("a", 1, (9, 99))
    others = [variants.corner("a", 2, (9, 99)), variants.corner("b", 1, (9, 99))]
    others.append(Variants("random", 3, False, 6).corner("a", 1, (9, 99)))
    assert variants.corner("a", 1, (9, 99)) not in others
    tops = {variants.corner(str(key), 0, (2, 0))[0] for key in range(100)}
    assert tops == {0, 1, 2}


def test_the_identity_contains_every_setting_that_changes_pixels():
    table, other = TABLES["sdxl"], TABLES["sdxl@256"]
    base = preprocess_identity(table, Variants(), "white")
    assert preprocess_identity(other, Variants(), "white")["buckets"] != base["buckets"]
    assert preprocess_identity(table, Variants(flip=True), "white")["flip"] != base["flip"]
    assert preprocess_identity(table, Variants(crop="random"), "white")["crop"] != base["crop"]
    assert preprocess_identity(table, Variants(seed=3), "white") == base  # a centre has no seed
    seeded = preprocess_identity(table, Variants(crop="random", seed=3), "white")
    assert seeded["crop"] != preprocess_identity(table, Variants(crop="random"), "white")["crop"]


def test_sizes_as_text():
    assert parse_size(size_name((512, 768))) == (512, 768)
    for wrong in ("512", "x", "1x2x3", "-1x2", "٢x2", None, 3, "1" * 10 + "x1"):
        with pytest.raises(ValueError, match="a size must look like 512x768"):
            parse_size(wrong)
