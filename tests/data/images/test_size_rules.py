"""Images that are left out for their size."""

import pytest

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, preprocess_identity
from fastvae.data.images.errors import ImageError
from fastvae.data.images.size_rules import SizeRules, is_enlarged


@pytest.mark.parametrize(
    ("original_hw", "enlarged"),
    [((64, 64), False), ((64, 96), False), ((63, 64), True), ((64, 63), True), ((16, 400), True), ((65, 65), False)],
)
def test_an_image_is_enlarged_if_it_is_smaller_than_its_bucket_in_a_side(original_hw, enlarged):
    assert is_enlarged(original_hw, (64, 64)) == enlarged
    rules = SizeRules(no_upscale=True)
    assert rules.reason(original_hw, (64, 64)) == ("below_bucket" if enlarged else None)


def test_the_shorter_side_is_compared_with_min_size():
    rules = SizeRules(min_size=32)
    assert rules.reason((31, 400), (16, 16)) == rules.reason((400, 31), (16, 16)) == "below_min_size"
    assert rules.reason((32, 32), (64, 64)) is None
    with pytest.raises(ImageError, match=r"a\.png is 400x31, a side under the 32 pixels of --min-size"):
        rules.check((31, 400), (16, 16), "a.png")
    with pytest.raises(ImageError, match=r"a\.png is 40x50 and would be enlarged to its bucket 64x64: --no-upscale"):
        SizeRules(no_upscale=True).check((50, 40), (64, 64), "a.png")


@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None])
def test_a_wrong_min_size_is_refused(value):
    with pytest.raises(ValueError, match="min_size must be a number of pixels"):
        SizeRules(value)


def test_rules_that_are_off_leave_the_identity_as_it_was():
    """Stores of earlier versions have no such fields."""
    table = Buckets.parse(64, 8)
    plain = preprocess_identity(table, Variants(), "white")
    assert preprocess_identity(table, Variants(), "white", "first", SizeRules()) == plain
    both = preprocess_identity(table, Variants(), "white", "first", SizeRules(8, True))
    assert both == {**plain, "min_size": 8, "no_upscale": True}
