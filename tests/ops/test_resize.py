"""resize_lanczos: the bytes of Pillow's resize, mirror and crop, and of a ragged batch's every picture."""

import mmap
import random

import pytest
import torch
from fastvae_kernels import resize
from fastvae_kernels.parts import lanczos, resize_tables
from fastvae_kernels.resize import Crop, plan, resize_lanczos
from fastvae_kernels.shared.runtime import INTERPRETED
from support.pillow_resize import packed, pillow_bytes, random_crop, random_picture
from support.short_run import short_run

pytestmark = pytest.mark.usefixtures("on_device")

# name: (H, W), scaled, box. Each is cropped to 9 x 11.
CASES = {
    "the smallest picture, enlarged": ((8, 8), (13, 12), None),
    "fewer lines than a window has": ((4, 40), (12, 11), None),
    "one pixel": ((1, 1), (9, 11), None),
    "twenty to one: a hundred weights": ((9, 240), (9, 12), None),
    "sixteen to one, down": ((150, 11), (9, 11), None),
    "lines alone": ((40, 11), (20, 11), None),
    "columns alone": ((9, 40), (9, 20), None),
    "neither: both passes are skipped": ((12, 13), (12, 13), None),
    "tall: the vertical pass comes first": ((70, 21), (31, 13), None),
    "tall, where columns grow": ((40, 9), (15, 16), None),
    "lines lost are twice the columns lost: horizontal first": ((40, 25), (20, 15), None),
    "a box of whole pixels": ((30, 31), (10, 12), (3.0, 4.0, 23.0, 28.0)),
    "a box of its own size": ((30, 31), (20, 21), (5.0, 6.0, 26.0, 26.0)),
    "a box with fractional edges": ((30, 31), (13, 17), (0.375, 2.7, 29.1, 28.03125)),
    "a box of less than a pixel, enlarged": ((16, 16), (9, 11), (4.25, 5.5, 4.75, 6.25)),
    "a box that ends inside the last pixel": ((30, 31), (10, 12), (10.1, 11.9, 30.6, 29.4)),
}
SIZE = (9, 11)


def batch(names):
    """Return the pictures of these cases, and two crops of each: the last of the scaled picture, and one mirrored."""
    pictures = [random_picture(*CASES[name][0], seed) for seed, name in enumerate(names)]
    buffer, offsets = packed(pictures)
    crops = []
    for name, offset in zip(names, offsets, strict=True):
        size, scaled, box = CASES[name]
        last = scaled[0] - SIZE[0], scaled[1] - SIZE[1]
        crops += [
            Crop(offset, size, scaled, last, False, box),
            Crop(offset, size, scaled, (last[0] // 2, 0), True, box),
        ]
    return pictures, buffer, crops


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_picture_has_pillows_bytes(name):
    pictures, buffer, crops = batch([name])
    out = resize_lanczos(buffer, *plan(crops, SIZE).to(buffer.device))
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    for index, crop in enumerate(crops):
        assert torch.equal(out[index].cpu(), pillow_bytes(pictures[0], crop, SIZE)), index


def test_a_ragged_batch_has_the_bytes_of_each_picture():
    """All sizes and both orders in one launch, by the kernels and by the reference."""
    pictures, buffer, crops = batch(list(CASES))
    tables = plan(crops, SIZE).to(buffer.device)
    together = resize_lanczos(buffer, *tables)
    assert torch.equal(resize.reference(buffer, *tables), together)
    for index, crop in enumerate(crops):
        assert torch.equal(together[index].cpu(), pillow_bytes(pictures[index // 2], crop, SIZE)), crop


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (17, 170), (8, 16)], ids=str)
def test_outputs_across_blocks_of_a_program(size):
    """More lines than a program has, and more bytes of a line; widths of whole and of ragged 16 bytes."""
    picture = random_picture(64, 200, 5)
    buffer, _ = packed([picture])
    crop = Crop(0, (64, 200), (40, 180), (40 - size[0], 7), True)
    out = resize_lanczos(buffer, *plan([crop], size).to(buffer.device))
    assert torch.equal(out[0].cpu(), pillow_bytes(picture, crop, size))


@pytest.mark.parametrize("count", short_run([200, 2000], [200]))
def test_random_sizes_boxes_and_crops_have_pillows_bytes(count):
    draw = random.Random(count)
    for seed in range(count):
        crop, size = random_crop(draw, 300)
        picture = random_picture(*crop.size, seed)
        out = resize.reference(picture.flatten(), *plan([crop], size))
        assert torch.equal(out[0].cpu(), pillow_bytes(picture, crop, size)), (crop, size)


PHOTOGRAPHS = [((64, 64), 64), ((64, 96), 256), ((512, 512), 64), ((800, 800), 512), ((1920, 1080), 512)]
LARGE = [((1080, 1920), 1024), ((4000, 6000), 64), ((6000, 4000), 512), ((4000, 6000), 1024)]


@pytest.mark.parametrize(("size", "bucket"), short_run(PHOTOGRAPHS + LARGE, PHOTOGRAPHS))
def test_photographs_from_64_pixels_to_24_megapixels(size, bucket):
    """Scaled to cover a square, cropped at the centre, as a run of encode does."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    photograph = image.fromarray(data.astronaut()).resize(size[::-1], image.Resampling.BICUBIC)
    picture = torch.from_numpy(numpy.array(photograph)).cpu()
    scaled = tuple(round(bucket * side / min(size)) for side in size)
    crop = Crop(0, size, scaled, ((scaled[0] - bucket) // 2, (scaled[1] - bucket) // 2), bucket == 64)
    out = resize.reference(picture.flatten(), *plan([crop], (bucket, bucket)))
    assert torch.equal(out[0].cpu(), pillow_bytes(picture, crop, (bucket, bucket)))


@pytest.mark.parametrize("count", short_run([12, 200], [12]))
def test_random_crops_by_the_kernels(count):
    draw = random.Random(-count)
    for seed in range(count):
        crop, size = random_crop(draw, 60)
        picture = random_picture(*crop.size, seed)
        buffer, _ = packed([picture])
        out = resize_lanczos(buffer, *plan([crop], size).to(buffer.device))
        assert torch.equal(out[0].cpu(), pillow_bytes(picture, crop, size)), (crop, size)


def test_before_pillow_13_the_horizontal_pass_was_always_first():
    image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    picture = random_picture(70, 21, 0)
    crop = Crop(0, (70, 21), (31, 13))
    wide = image.fromarray(picture.numpy()).resize((13, 70), image.Resampling.LANCZOS)
    want = pillow_bytes(torch.from_numpy(numpy.array(wide)), Crop(0, (70, 13), (31, 13)), (31, 13))
    old, new = (resize.reference(picture.flatten(), *plan([crop], (31, 13), pillow)) for pillow in (12, 13))
    assert torch.equal(old[0], want)
    assert not torch.equal(new, old)


def test_pictures_beyond_two_gigabytes():
    """The last picture begins past 2^31 bytes; memory that nothing touches takes no room."""
    picture = random_picture(20, 30, 0)
    offset = 2**31 + 7
    with mmap.mmap(-1, offset + picture.numel()) as memory:
        memory[offset:] = picture.numpy().tobytes()
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        tables = plan([Crop(offset, (20, 30), (10, 12))], SIZE)
        out = [call(buffer, *tables).cpu() for call in (resize.reference, resize_lanczos)]
        del buffer
    want = pillow_bytes(picture, Crop(0, (20, 30), (10, 12)), SIZE)
    assert all(torch.equal(one[0], want) for one in out)


def test_lines_beyond_two_gigabytes():
    """The tenth line of a picture 80 million pixels wide, of which a box of 30 is scaled."""
    picture, width = random_picture(12, 30, 0), 80_000_000
    with mmap.mmap(-1, 12 * 3 * width) as memory:
        for line in range(12):
            memory[line * 3 * width : line * 3 * width + 90] = picture[line].numpy().tobytes()
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        tables = plan([Crop(0, (12, width), (11, 30), (2, 3), False, (0, 0, 30, 12))], SIZE)
        assert 11 * int(tables.rows[0, 1]) > 2**31
        out = [call(buffer, *tables).cpu() for call in (resize.reference, resize_lanczos)]
        del buffer
    want = pillow_bytes(picture, Crop(0, (12, 30), (11, 30), (2, 3)), SIZE)
    assert all(torch.equal(one[0], want) for one in out)


@pytest.mark.skipif(not INTERPRETED, reason="a temporary that takes no room is the host's")
def test_a_temporary_beyond_two_gigabytes():
    """The first pass of a picture whose lines are the temporary's last."""
    picture, between, base = random_picture(8, 8, 0), 1024, 2**21 + 8
    rows, blocks, weights, *_ = plan([Crop(0, (8, 8), (8, 8))], (8, 8))
    rows[0, 4] = base
    with mmap.mmap(-1, (base + 8) * between) as memory:
        temporary = torch.frombuffer(memory, dtype=torch.uint8)
        constants = {"FIRST": True, "LINES": resize_tables.LINES, "BLOCK": resize.BLOCK}
        resize._pass_kernel[(1, 1)](picture, temporary, rows, blocks, weights, between, 8, 8, **constants)
        last = temporary[base * between :].view(8, between)[:, :24].clone()
        del temporary
    assert torch.equal(last, picture.view(8, 24))


def test_edges_of_a_box_are_kept_in_fp32():
    """At 100,000 pixels fp32 has steps of 1/128."""
    picture = random_picture(9, 100_100, 1)
    crop = Crop(0, (9, 100_100), (9, 12), (0, 1), False, (100_000.003, 0, 100_009.006, 9))
    out = resize.reference(picture.flatten(), *plan([crop], SIZE))
    assert torch.equal(out[0].cpu(), pillow_bytes(picture, crop, SIZE))


def test_the_width_of_a_box_is_rounded_to_fp32():
    """The last of 700 outputs: without that rounding its window would be 1e-5 pixels to the side."""
    low, width = torch.tensor([0.3, 1000.0 - torch.tensor(0.3).item()]).tolist()
    first, weights = lanczos.axis(1000, 700, 0.3, 1000.0)
    centre = low + 699.5 * (width / 700)
    exact = torch.tensor(lanczos._exact(int(first[-1]), 1000, centre, 700 / width), dtype=torch.float64)
    assert torch.equal(weights[: len(exact), -1], lanczos._round(exact * 2**22))


def test_the_weights_are_the_c_librarys(monkeypatch):
    """Computed one by one with the C library's sine, as Pillow does, or all at once: the same weights."""
    sizes = [(64, 48, 0.25), (7, 300, 0.25), (1080, 512, 0.0), (33, 11, 0.0), (4000, 96, 3.5), (5, 1, 0.0)]
    at_once = [lanczos.axis.__wrapped__(old, new, low, float(old)) for old, new, low in sizes]
    monkeypatch.setattr(lanczos, "_NEAR", 1.0)
    for (old, new, low), axis in zip(sizes, at_once, strict=True):
        one_by_one = lanczos.axis.__wrapped__(old, new, low, float(old))
        assert torch.equal(axis.first, one_by_one.first)
        assert torch.equal(axis.weights, one_by_one.weights)


def test_weights_near_a_rounding_limit_are_computed_one_by_one(monkeypatch):
    """From 937 values to 64 the first such pair of outputs, which mirror each other."""
    asked, exact = [], lanczos._exact
    monkeypatch.setattr(lanczos, "_exact", lambda *given: asked.append(given) or exact(*given))
    lanczos.axis.__wrapped__(937, 64, 0.0, 937.0)
    assert len(asked) == 2


def test_weights_whose_sums_leave_int32_are_refused(monkeypatch):
    """Sums at either limit, and one past it; and all weights of 23 bits in place of 22."""
    limit = (2**31 - 2**21) // 255
    for weights in ([limit - 5, 5], [limit, -1], [-8421504, 1], [-8421503, -1]):
        lanczos._check_sums(torch.tensor([weights, [0, 0]], dtype=torch.int32))
    for weights in ([limit - 5, 6], [-8421504, -1], [2**31 - 1, 2**31 - 1]):
        with pytest.raises(OverflowError, match="weights of an output must add up to"):
            lanczos._check_sums(torch.tensor([weights, [0, 0]], dtype=torch.int32))
    assert lanczos.axis(2, 4096, 0.0, 2.0).weights.max() > 0
    monkeypatch.setattr(lanczos, "BITS", 23)
    with pytest.raises(OverflowError, match="weights of an output must add up to"):
        lanczos.axis.__wrapped__(2, 4096, 0.0, 2.0)


def test_no_output_weighs_more_than_nine_sevenths():
    """The exact bound of _check_sums, which no size reaches, plus the rounding of each weight."""
    sizes = [(2, 4096), (4, 5), (3, 4), (6000, 64), *((old, new) for old in range(1, 40) for new in (1, 7, 30))]
    for old, new in sizes:
        weights = lanczos.axis(old, new, 0.0, float(old)).weights.long()
        assert 7 * weights.clamp(min=0).sum(0).max() <= 9 * 2**22 + 7 * len(weights), (old, new)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_tables_take_no_default_of_torch(default):
    """Made on the CPU and in fp64, whatever torch's defaults are."""
    crops = [Crop(0, (40, 30), (13, 17), (1, 2), True, (0.375, 2.7, 29.1, 28.03125))]
    expected, empty = plan(crops, SIZE), plan([], SIZE)
    lanczos.axis.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if default == "device" else torch.set_default_dtype(torch.bfloat16)
        tables, none = plan(crops, SIZE), plan([], SIZE)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert all(map(torch.equal, tables[:3], expected[:3]))
    assert [table.device.type for table in none[:3]] == [table.device.type for table in empty[:3]] == ["cpu"] * 3


def test_windows_stay_inside():
    """No program reads outside the picture, whatever the weights: each window ends at the last value or before."""
    for old, new, low, high in [(8, 64, 0, 8), (5, 1, 0, 5), (100, 7, 0.5, 99.5), (30, 30, 0, 30), (1, 9, 0, 1)]:
        first, weights = lanczos.axis(old, new, float(low), float(high))
        assert first.min() >= 0
        assert int(first.max()) + len(weights) <= old
    assert len(lanczos.axis(30, 30, 0.0, 30.0).weights) == 1


def test_the_tables_of_one_size_are_made_once():
    size, crops = (6, 6), [Crop(offset, (20, 20), (8, 8)) for offset in (0, 1200, 2400)]
    assert plan(crops, size).weights.numel() == plan(crops[:1], size).weights.numel()
    assert plan([], size).rows.shape == (0, len(resize_tables.FIELDS))


def test_a_batch_of_none():
    tables = plan([], SIZE)
    buffer = torch.empty(0, dtype=torch.uint8)
    assert resize_lanczos(buffer, *tables.to(buffer.device)).shape == (0, *SIZE, 3)


@pytest.mark.parametrize(
    ("crop", "size", "words"),
    [
        (Crop(0, (8, 8), (9, 9)), (0, 4), "size must be"),
        (Crop(-1, (8, 8), (9, 9)), (4, 4), "offset of at least 0"),
        (Crop(0, (8, 0), (9, 9)), (4, 4), "sizes of at least 1"),
        (Crop(0, (8, 8), (9, 9), (6, 0)), (4, 4), r"corner must leave .*\(4, 4\) inside .*\(9, 9\), got \(6, 0\)"),
        (Crop(0, (8, 8), (9, 9), (0, -1)), (4, 4), "corner must leave"),
        (Crop(0, (8, 8), (9, 9), box=(0, 0, 8.5, 8)), (4, 4), "box must be"),
        (Crop(0, (8, 8), (9, 9), box=(0, 3, 8, 3)), (4, 4), "box must be"),
    ],
)
def test_crops_outside_their_picture_are_refused(crop, size, words):
    with pytest.raises(ValueError, match=words):
        plan([crop], size)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: lambda t: t[:-1]}, "buffer must have the 192 bytes of its pictures, got 191"),
        ({0: lambda t: t.int()}, r"buffer must be contiguous uint8 \[bytes\]"),
        ({1: lambda t: t[:, :9]}, r"rows must be int64 \[N, 10\]"),
        ({2: lambda t: t.long()}, r"blocks must be int32 \[B, 2\]"),
        ({3: lambda t: t.view(1, -1)}, r"weights must be int32 \[M\]"),
        ({6: lambda value: 0}, "height and width must be at least 1"),
    ],
)
def test_other_arguments_are_refused(changed, words):
    given = [torch.zeros(192, dtype=torch.uint8), *plan([Crop(0, (8, 8), (9, 9))], (4, 4))]
    for index, change in changed.items():
        given[index] = change(given[index])
    for call in (resize.reference, resize.launch, resize_lanczos):
        with pytest.raises(ValueError, match=words):
            call(*given)


def test_opcheck_and_one_graph():
    _, buffer, crops = batch(["one pixel", "tall: the vertical pass comes first"])
    tables = plan(crops, SIZE).to(buffer.device)
    torch.library.opcheck(resize_lanczos, (buffer, *tables))
    compiled = torch.compile(resize_lanczos, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(buffer, *tables), resize_lanczos(buffer, *tables))
