"""alpha="mask": the stored opacity of every kind of transparent file, and latents that do not depend on the policy."""

import random
from pathlib import Path

import numpy as np
import pytest
from data.failures.corpus import encoded, png, png_chunk
from PIL import Image
from safetensors.numpy import load_file
from support.small_store import SIDE, picture, small_vae

from fastvae.data.encoding.encode import encode
from fastvae.data.images.colour import to_srgb
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import read_image
from fastvae.data.store.store import Store

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}
FACTOR = 8  # of the small model
PNG_START = b"\x89PNG\r\n\x1a\n"

# Images at their bucket's size, so that nothing is scaled, and the opacity of each pixel

generator = np.random.default_rng(5)
COLOURS = np.asarray(picture(1, SIDE, SIDE))
GREY = COLOURS[..., 0]
OPACITY = generator.integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
OPACITY[:8], OPACITY[8:16] = 0, 255  # a row of transparent latents, and one of opaque latents
HOLES = np.where(generator.random((SIDE, SIDE)) < 0.3, 0, 255).astype(np.uint8)
HOLES[:8], HOLES[8:16] = 0, 255
PALETTE_LEVELS = bytes(range(3, 256, 4)) + b"\xff" * 64


def with_transparent(data: bytes, key: bytes) -> bytes:
    """A PNG with ``key`` as its tRNS chunk, for what Pillow does not write."""
    at = data.index(b"IDAT") - 4
    return data[:at] + png_chunk(b"tRNS", key) + data[at:]


def grey_png(levels: np.ndarray, bits: int, key: int) -> bytes:
    """``levels`` as a grey PNG of ``bits`` per pixel, with ``key`` transparent."""
    if bits == 16:
        rows = levels.astype(">u2").view(np.uint8)
    else:
        pixels = np.unpackbits(levels.astype(np.uint8)[..., None], axis=2)[..., -bits:]
        rows = np.packbits(pixels.reshape(len(levels), -1), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    return with_transparent(png(SIDE, SIDE, bits, 0, body), key.to_bytes(2, "big"))


def holed(shown: np.ndarray, key: np.ndarray | int) -> np.ndarray:
    """``shown`` [H, W, ...] with ``key`` at HOLES and nowhere else."""
    same = shown == key
    shown = np.where((same.all(-1, keepdims=True) if shown.ndim == 3 else same), shown ^ 1, shown)
    return np.where(HOLES[..., None] == 0 if shown.ndim == 3 else HOLES == 0, key, shown)


def rgba(opacity: np.ndarray = OPACITY) -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, opacity]))


def deep_rgb_png(key: tuple[int, int, int]) -> bytes:
    """A PNG of 16 bits per sample; every colour with the high bytes of ``key`` is ``key``."""
    high = holed(COLOURS, np.array(key) >> 8).astype(np.uint16)
    low = generator.integers(0, 256, high.shape).astype(np.uint16)
    samples = np.where(HOLES[..., None] == 0, np.array(key), high << 8 | low).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    return with_transparent(png(SIDE, SIDE, 16, 2, rows), np.array(key, ">u2").tobytes())


def _golden() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name: its bytes, and the opacity of each upright pixel."""
    opaque = np.full_like(OPACITY, 255)
    indexed = Image.fromarray(COLOURS).quantize(128)
    index = np.asarray(indexed)
    one_clear = Image.frombytes("P", (SIDE, SIDE), np.where(HOLES == 0, 130, index).astype(np.uint8).tobytes())
    one_clear.putpalette([*indexed.getpalette(), *bytes(768)][:768])
    frames = {"save_all": True, "append_images": [rgba(opaque)], "lossless": True, "exact": True}
    cases = {
        "rgba.png": (encoded(rgba(), "PNG"), OPACITY),
        "rgba.webp": (encoded(rgba(), "WEBP", lossless=True, exact=True), OPACITY),
        "rgba.tiff": (encoded(rgba(), "TIFF"), OPACITY),
        "rgba, first frame.webp": (encoded(rgba(), "WEBP", **frames), OPACITY),
        "rgba, first frame.png": (encoded(rgba(), "PNG", save_all=True, append_images=[rgba(opaque)]), OPACITY),
        "la.png": (encoded(Image.fromarray(np.dstack([GREY, OPACITY])), "PNG"), OPACITY),
        "palette of levels.png": (
            encoded(indexed, "PNG", transparency=PALETTE_LEVELS),
            np.frombuffer(PALETTE_LEVELS, np.uint8)[index],
        ),
        "palette, one clear.png": (encoded(one_clear, "PNG", transparency=130), HOLES),
        "palette, one clear.gif": (encoded(one_clear, "GIF", transparency=130), HOLES),
        "colour key.png": (
            encoded(
                Image.fromarray(holed(COLOURS, np.array([9, 8, 7])).astype(np.uint8)), "PNG", transparency=(9, 8, 7)
            ),
            HOLES,
        ),
        "16-bit colour key.png": (deep_rgb_png((0x12FE, 0x00A0, 0xFF01)), HOLES),
        "16-bit grey.png": (grey_png(holed(GREY.astype(int) * 257, 0x1234), 16, 0x1234), HOLES),
        "8-bit grey.png": (grey_png(holed(GREY, 77), 8, 77), HOLES),
        "4-bit grey.png": (grey_png(holed(GREY >> 4, 5), 4, 5), HOLES),
        "2-bit grey.png": (grey_png(holed(GREY >> 6, 2), 2, 2), HOLES),
        "1-bit grey.png": (grey_png(HOLES // 255, 1, 0), HOLES),
        "rgb.png": (encoded(Image.fromarray(COLOURS), "PNG"), opaque),
        "rgb.jpg": (encoded(Image.fromarray(COLOURS), "JPEG"), opaque),
        "cmyk.jpg": (encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"), opaque),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"turned {orientation}.png"] = (encoded(rgba(), "PNG", exif=exif), turned(OPACITY, orientation))
    return cases


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """``stored`` upright, by EXIF's table of its first row and column."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }[orientation]


GOLDEN = _golden()


def in_cells(opacity: np.ndarray) -> np.ndarray:
    """The mean of each 8 x 8 pixels, rounded half up."""
    rows = [
        [opacity[top : top + FACTOR, left : left + FACTOR].astype(float).mean() for left in range(0, SIDE, FACTOR)]
        for top in range(0, SIDE, FACTOR)
    ]
    return np.floor(np.array(rows) + 0.5).astype(np.uint8)


def rows_of(out) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Tensors of each row of a store, as safetensors reads them."""
    rows = {}
    for path in sorted((out / "shards").glob("*.safetensors")):
        tensors = load_file(path)
        text, offsets = tensors.pop("key_utf8").tobytes(), tensors.pop("key_offset").tolist()
        for number in range(len(offsets) - 1):
            key = text[offsets[number] : offsets[number + 1]].decode()
            row = {name: tensor[number] for name, tensor in tensors.items()}
            rows[key, int(row["variant"])] = row
    return rows


_encoded: list[Path] = []


@pytest.fixture
def golden(tmp_path_factory):
    """Folder of the golden images and their stores by alpha "mask" and "white".

    Made once, but during a test: settings of conftest.py for each test decide which layers run.
    """
    if _encoded:
        return _encoded[0]
    folder = tmp_path_factory.mktemp("golden")
    (folder / "in").mkdir()
    for name, (data, _) in GOLDEN.items():
        (folder / "in" / name).write_bytes(data)
    for alpha in ("mask", "white"):
        report = encode(folder / "in", folder / alpha, vae=small_vae(), alpha=alpha, **OPTIONS)
        assert (report.ok, report.failed) == (len(GOLDEN), 0)
    _encoded.append(folder)
    return folder


def test_row_05_every_kind_of_transparency_gives_its_mask(golden):
    rows = rows_of(golden / "mask")
    assert {name for name, _ in rows} == GOLDEN.keys()
    for name, (_, opacity) in GOLDEN.items():
        found = rows[name, 0]["alpha"]
        assert (found.dtype, found.tolist()) == (np.uint8, in_cells(opacity).tolist()), name


def test_row_05_latents_of_alpha_mask_are_those_of_alpha_white(golden):
    masked, white = rows_of(golden / "mask"), rows_of(golden / "white")
    assert masked.keys() == white.keys()
    for name, row in masked.items():
        assert "alpha" not in white[name]
        for part in ("mean", "logvar"):
            assert row[part].tobytes() == white[name][part].tobytes(), name


def test_row_05_colours_of_transparent_pixels_change_no_latent(tmp_path):
    (tmp_path / "in").mkdir()
    for number, hidden in enumerate((0, 200)):
        colours = np.where(HOLES[..., None] == 0, hidden, COLOURS).astype(np.uint8)
        Image.fromarray(np.dstack([colours, HOLES])).save(tmp_path / "in" / f"{number}.png")
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), alpha="mask", **OPTIONS)
    first, second = rows_of(tmp_path / "out").values()
    for part in ("mean", "logvar", "alpha"):
        assert first[part].tobytes() == second[part].tobytes(), part


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_row_05_premultiplied_colours_have_a_mask(mode):
    """Pillow opens no file in these modes today, but converts to them."""
    source = rgba() if mode == "RGBa" else Image.fromarray(np.dstack([GREY, OPACITY]))
    rgb, opacity = to_srgb(source.convert(mode), "TIFF", "mask", [], "x")
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(opacity), OPACITY)


def test_row_05_only_alpha_mask_returns_an_opacity():
    data = GOLDEN["rgba.png"][0]
    assert np.array_equal(np.asarray(read_image(data, alpha="mask").opacity), OPACITY)
    assert [read_image(data, alpha=alpha).opacity for alpha in ("white", "drop")] == [None, None]
    assert read_image(GOLDEN["rgb.jpg"][0], alpha="mask").opacity is None


@pytest.mark.parametrize("bits", [2, 4, "16-bit colour"])
def test_row_05_a_transparent_colour_becomes_white_at_every_depth(bits):
    """Pillow scales the pixels of such files to 8 bits, but not the transparent colour."""
    read = read_image(GOLDEN[f"{bits} key.png" if isinstance(bits, str) else f"{bits}-bit grey.png"][0])
    assert ((np.asarray(read.image) == 255).all(-1) >= (HOLES == 0)).all()
    key = {2: 170, 4: 85}.get(bits, 0x12)
    assert not (np.asarray(read.image)[HOLES == 0][:, 0] == key).any()


def test_row_01_inconsistent_png_transparency_raises_only_image_errors():
    """Depths, palettes and transparent colours that contradict each other, in chunks with valid checksums."""
    chance, outcomes = random.Random(0), set()
    pictures = [data for name, (data, _) in GOLDEN.items() if name.endswith(".png")]
    for _ in range(600):
        chunks = chunks_of(chance.choice(pictures))
        number = chance.randrange(len(chunks))
        name, body = chunks[number]
        if name == b"IHDR":
            body = body[:8] + bytes([chance.choice((1, 2, 4, 8, 16)), chance.choice((0, 2, 3, 4, 6))]) + body[10:]
        else:
            body = body[: chance.randrange(len(body) + 1)]
        chunks[number] = name, body
        made = chance.choice((b"tRNS", b"PLTE")), chance.randbytes(chance.choice((1, 2, 3, 6, 48, 256, 300, 768)))
        chunks.insert(chance.randrange(1, len(chunks)), made)
        data = PNG_START + b"".join(png_chunk(*chunk) for chunk in chunks)
        try:
            read = read_image(data, alpha="mask", max_pixels=10**6)
            outcomes.add(read.opacity is None)
            assert read.image.tobytes() == read_image(data, max_pixels=10**6).image.tobytes()
        except ImageError as error:
            outcomes.add(error.reason)
    assert {True, False, "decode_error"} <= outcomes


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and body of each chunk of a PNG."""
    at, chunks = len(PNG_START), []
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    return chunks


@pytest.mark.parametrize("clear", [3, 300])
def test_row_01_a_palette_with_more_levels_than_colours_is_read(clear):
    """Pillow accepts such a tRNS chunk and later raises ValueError."""
    index = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 250
    image = Image.frombytes("P", (SIDE, SIDE), index.astype(np.uint8).tobytes())
    image.putpalette(bytes(range(256)) * 3)
    for levels in (bytes(255 if number != clear else 0 for number in range(400)), bytes([7] * 400)):
        opacity = read_image(with_transparent(encoded(image, "PNG"), levels), alpha="mask").opacity
        found = np.full_like(index, 255) if opacity is None else np.asarray(opacity)
        assert np.array_equal(found, np.frombuffer(levels, np.uint8)[index])


def test_row_05_masks_are_scaled_cropped_and_mirrored_like_the_colours(tmp_path):
    (tmp_path / "in").mkdir()
    width, height = 60, 40
    opacity = np.asarray(picture(4, width, height))[..., 0]
    opacity = np.where(opacity < 90, 0, opacity).astype(np.uint8)
    Image.fromarray(np.dstack([np.asarray(picture(5, width, height)), opacity])).save(tmp_path / "in" / "a.png")
    options = {"crop": "random", "variants": 3, "flip": True, "seed": 3, **OPTIONS}
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), alpha="mask", **options)
    rows = rows_of(tmp_path / "out")
    scaled = np.asarray(Image.fromarray(opacity).resize((48, SIDE), Image.Resampling.LANCZOS))
    corners = set()
    for number in range(6):
        row = rows["a.png", number]
        shown = scaled[:, ::-1] if number % 2 else scaled
        top, left, *size = row["crop_tlhw"].tolist()
        assert size == [SIDE, SIDE]
        assert np.array_equal(row["alpha"], in_cells(shown[top : top + SIDE, left : left + SIDE])), number
        corners.add(left)
        if number % 2:
            assert np.array_equal(row["alpha"], rows["a.png", number - 1]["alpha"][:, ::-1])
    assert len(corners) > 3


def test_planned_and_committed_bytes_include_the_mask(golden):
    sizes = {alpha: Store.open(golden / alpha).commits()[0].bytes for alpha in ("mask", "white")}
    cells = len(GOLDEN) * (SIDE // FACTOR) ** 2
    assert cells <= sizes["mask"] - sizes["white"] < cells + 128  # and its entry in the header
    planned = {
        alpha: encode(
            golden / "in", golden / "new", vae=small_vae(), alpha=alpha, dry_run=True, **OPTIONS
        ).planned_bytes
        for alpha in ("mask", "white")
    }
    assert planned["mask"] - planned["white"] == cells
