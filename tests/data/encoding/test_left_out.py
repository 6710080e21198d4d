"""Images that an encode run leaves out or names: by size, by pattern, masks, folders of systems."""

import io
import json
import tarfile
from dataclasses import replace

import fsspec
import pytest
from click.testing import CliRunner
from support.small_store import SIDE, picture, small_vae, write_pictures

from fastvae.cli.main import cli
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.options import LatentOptions
from fastvae.data.encoding.repair import repair
from fastvae.data.rows import SourceFile, parse_size
from fastvae.data.sources.companions import companion_patterns
from fastvae.data.sources.open import open_source
from fastvae.data.sources.source import Listing
from fastvae.data.store.errors import IdentityMismatch
from fastvae.data.store.store import Store
from fastvae.latents.scaling import downsample_factor

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def write(folder, *names, width=48, height=40):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, width, height).save(path)


@pytest.fixture
def sizes(tmp_path):
    """A folder of an image above its bucket, one below it, and one far below it."""
    for name, side in (("large", 40), ("small", 24), ("tiny", 9)):
        write(tmp_path / "in", f"{name}.png", width=side, height=side)
    return tmp_path / "in"


def test_enlarged_images_are_counted(sizes, tmp_path):
    planned = encode(sizes, tmp_path / "out", vae=small_vae(), dry_run=True, **OPTIONS)
    assert planned.flags == {"upscaled": 2}
    report = encode(sizes, tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.flags) == (3, {"upscaled": 2})
    assert json.loads(report.to_json())["flags"] == {"upscaled": 2}
    assert "flags   upscaled 2" in report.lines()


@pytest.mark.parametrize(
    ("rule", "reasons"),
    [
        ({"min_size": 16}, {"below_min_size": 1}),
        ({"no_upscale": True}, {"below_bucket": 2}),
        ({"min_size": 16, "no_upscale": True}, {"below_bucket": 1, "below_min_size": 1}),
    ],
    ids=str,
)
def test_small_images_are_left_out_and_do_not_count_as_failures(sizes, tmp_path, rule, reasons):
    planned = encode(sizes, tmp_path / "out", vae=small_vae(), dry_run=True, **rule, **OPTIONS)
    assert planned.reasons == reasons
    report = encode(sizes, tmp_path / "out", vae=small_vae(), max_failures=0, **rule, **OPTIONS)
    assert (report.ok, report.reasons, report.exceeded) == (3 - sum(reasons.values()), reasons, False)
    # Both rules are the store's: another run keeps to them, and a repair does as well.
    with pytest.raises(IdentityMismatch, match=r"min_size|no_upscale"):
        encode(sizes, tmp_path / "out", vae=small_vae(), **OPTIONS)
    store = Store.open(tmp_path / "out")
    unit = next(unit for unit in store.units() if unit.number in store.commits())
    shard = tmp_path / "out" / "shards" / f"{unit.stem}.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    repair(tmp_path / "out", sizes, vae=small_vae(), progress=False, device="cpu")
    assert shard.read_bytes() == whole


def test_a_store_with_an_impossible_size_rule_is_refused(sizes, tmp_path):
    encode(sizes, tmp_path / "out", vae=small_vae(), **OPTIONS)
    with pytest.raises(ValueError, match="min_size must be a number of pixels, got -1"):
        encode(sizes, tmp_path / "new", vae=small_vae(), min_size=-1, **OPTIONS)
    assert not (tmp_path / "new").exists()


KEYS = ["0.png", "0-masklabel.png", "a/b.mask.png", "a/c.jpg", "masks/0.png", "masks/deep/1.png"]
EXCLUDED = {
    "*-masklabel.*": {"0-masklabel.png"},
    "*.mask.*": {"a/b.mask.png"},
    "*.{png,webp}": {"0.png", "0-masklabel.png", "a/b.mask.png", "masks/0.png", "masks/deep/1.png"},
    "masks/": {"masks/0.png", "masks/deep/1.png"},
    "masks/**": {"masks/0.png", "masks/deep/1.png"},
    "masks/*": {"masks/0.png"},
    "**/b*": {"a/b.mask.png"},
    "masks": set(),
    "A/*": set(),
}


@pytest.mark.parametrize("pattern", EXCLUDED)
def test_a_pattern_leaves_out_what_it_matches(pattern):
    listing = Listing([SourceFile(key, 1, 1) for key in KEYS])
    listing.leave_out([pattern])
    assert listing.excluded == EXCLUDED[pattern]
    assert [file.key for file in listing.files] == [key for key in KEYS if key not in EXCLUDED[pattern]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["*"], "exclude must leave an image"), ("*.png", "must be a list"), (["[z-a]"], "must be a pattern")],
)
def test_a_pattern_that_leaves_nothing_or_is_none_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        Listing([SourceFile("0.png", 1, 1)]).leave_out(patterns)


COMPANIONS = {
    "suffix": (["0.png", "0-masklabel.png", "1.png", "1-masklabel.png"], {"*-masklabel*": 2}),
    "dotted": (["0000.png", "0000.mask.png"], {"*.mask*": 1}),
    "another type of file": (["a/0.jpg", "a/0_depth.png", "a/0-CONTROL.png"], {"*_depth*": 1, "*-CONTROL*": 1}),
    "keys of a tar": (["0", "0.mask"], {"*.mask*": 1}),
    "prefix": (["mask_0.png", "0.png", "a/label-1.png", "a/1.jpg"], {"mask_*": 1, "label-*": 1}),
    "folder below": (["0.jpg", "1.jpg", "masks/0.png", "masks/1.png"], {"masks/**": 2}),
    "folder beside": (["set/images/0.jpg", "set/conditioning_images/0.png"], {"set/conditioning_images/**": 1}),
    "folder before in the alphabet": (["canny/0.png", "photos/0.jpg"], {"canny/**": 1}),
    "no counterpart": (["gas-mask.png", "masks/venice.png", "normal.png", "0.png", "1.mask.png"], {}),
    "no counterpart of a prefix": (["edge_of_town.png", "0.png"], {}),
    "only masks": (["masks/0.png", "masks/1.png"], {}),
}


@pytest.mark.parametrize("case", COMPANIONS)
def test_masks_and_control_images_are_found_by_name(case):
    keys, expected = COMPANIONS[case]
    files = [SourceFile(key, 1, 1) for key in keys]
    assert companion_patterns(files) == expected
    listing = Listing(files)
    if expected:  # the patterns named match what was counted
        listing.leave_out(list(expected))
    assert len(listing.excluded) == sum(expected.values())
    assert companion_patterns(listing.files) == {}


def test_masks_are_named_before_the_run_and_excluded_by_the_pattern_that_is_named(tmp_path):
    write(tmp_path / "in", "0.png", "0-masklabel.png", "1.png")
    arguments = ["encode", str(tmp_path / "in"), "--vae", "tiny", "--buckets", "32", "--device", "cpu", "--json"]
    named = CliRunner().invoke(cli, [*arguments[:2], str(tmp_path / "all"), *arguments[2:]])
    assert named.exit_code == 0
    assert "masks   1 images look like masks or control images" in named.stderr
    assert "--exclude '*-masklabel*' leaves them out" in named.stderr
    found = json.loads(named.stdout)
    assert (found["ok"], found["masks"], found["excluded"]) == (3, {"*-masklabel*": 1}, 0)
    options = [*arguments[2:], "--exclude", "*-masklabel*"]
    without = CliRunner().invoke(cli, [*arguments[:2], str(tmp_path / "some"), *options])
    found = json.loads(without.stdout)
    assert (found["ok"], found["masks"], found["excluded"]) == (2, {}, 1)
    assert "exclude 1 images left out" in without.stderr
    assert {key for key, _ in Store.open(tmp_path / "some").resolve()} == {"0.png", "1.png"}


def test_an_image_that_was_planned_before_is_excluded_and_comes_back(tmp_path, monkeypatch):
    """A run is stopped because of its masks: the rest of its plan leaves them out, and a later run may take them."""
    write(tmp_path / "in", "0.png", "0.mask.png")
    with monkeypatch.context() as stopped:
        stopped.setattr("fastvae.data.encoding.run.encode_units", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), exclude=["*.mask.*"], max_failures=0, **OPTIONS)
    assert (report.ok, report.reasons, report.exceeded) == (1, {"excluded": 1}, False)
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.reasons) == (1, {})


SYSTEM_FOLDERS = ["@eaDir/a.jpg", "#recycle", "#snapshot", ".@__thumb", "@Recycle", ".thumbnails/normal", "__MACOSX"]
SYSTEM_FOLDERS += ["$RECYCLE.BIN", ".Trash-1000/files", "x/@eadir", "Catalog Previews.lrdata", ".AppleDouble"]
SYSTEM_FOLDERS += ["lost+found", "FOUND.000", "~snapshot/daily", ".snapshot", "@SynoEAStream", "Network Trash Folder"]


@pytest.mark.parametrize("folder", SYSTEM_FOLDERS)
def test_folders_that_systems_make_are_passed_over_and_counted(folder, tmp_path):
    write(tmp_path / "in", "a.png", "album/b.png", f"album/{folder}/SYNOPHOTO_THUMB_M.png", f"{folder}/c.png")
    (tmp_path / "in" / folder / "notes.txt").write_text("no image")
    top = next(part for part in folder.split("/") if part != "x")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(tmp_path / "in", ".")
    (tmp_path / "in.tar").write_bytes(archive.getvalue())
    for source, keys in (
        (tmp_path / "in", ["a.png", "album/b.png"]),
        (f"{tmp_path}/in/**/*.png", ["a.png", "album/b.png"]),
        (tmp_path / "in.tar", ["./a", "./album/b"]),
    ):
        listing = open_source(source).listing()
        assert [file.key for file in listing.files] == keys
        assert listing.passed_over == {top: 2}
    assert [file.key for file in open_source(tmp_path / "in" / folder).listing().files][-1] == "c.png"


def test_folders_of_systems_under_a_url_are_passed_over_and_counted():
    files = fsspec.filesystem("memory")
    for place in ("a.png", "@eaDir/b.png", "album/.@__thumb/c.png", "album/.hidden/d.png"):
        files.pipe(f"/left out/{place}", b"x")
    listing = open_source("memory://left out").listing()
    assert [file.key for file in listing.files] == ["a.png"]
    assert (listing.passed_over, listing.ignored) == ({"@eaDir": 1, ".@__thumb": 1, ".hidden": 1}, 0)


def test_images_in_hidden_folders_are_counted_and_hidden_files_ignored(tmp_path):
    write(tmp_path, "a.png", ".cache/b.png", ".cache/deep/c.png", "x/.d.png")
    listing = open_source(tmp_path).listing()
    assert [file.key for file in listing.files] == ["a.png"]
    assert (listing.passed_over, listing.ignored) == ({".cache": 2}, 1)


def test_a_pattern_of_one_level_passes_folders_of_systems_over(tmp_path):
    write(tmp_path / "in", "@eaDir/a.png", "album/b.png")
    listing = open_source(f"{tmp_path}/in/*/*.png").listing()
    assert ([file.key for file in listing.files], listing.passed_over) == (["album/b.png"], {"@eaDir": 1})
    report = encode(f"{tmp_path}/in/*/*.png", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert json.loads(report.to_json())["passed_over"] == {"@eaDir": 1}
    assert "passed  images in hidden folders and those that systems make are left out: @eaDir 1" in report.lines()


def test_buckets_of_models_with_16_channels_are_multiples_of_16_and_an_earlier_store_keeps_its_own(tmp_path):
    keys = write_pictures(tmp_path / "in", 2)
    sixteen = small_vae(latent_channels=16)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"side": 64, "sizes": [[48, 80], [64, 64]]}))
    options = {**OPTIONS, "buckets": f"{table}@32"}
    factor = downsample_factor(sixteen)
    report = encode(tmp_path / "in", tmp_path / "new", vae=sixteen, **options)
    assert report.notes == []
    assert all(side % (2 * factor) == 0 for size in stored_buckets(tmp_path / "new") for side in parse_size(size))
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(LatentOptions, "settings", earlier_settings(LatentOptions.settings))
        encode(tmp_path / "in", tmp_path / "old", vae=sixteen, limit=1, **options)
    old = stored_buckets(tmp_path / "old")
    assert old != stored_buckets(tmp_path / "new")
    report = encode(tmp_path / "in", tmp_path / "old", vae=sixteen, **options)
    assert (report.ok, report.resumed, stored_buckets(tmp_path / "old")) == (len(keys) - 1, 1, old)
    assert "cannot take their latents" in report.notes[0]


def stored_buckets(path) -> list[str]:
    return Store.open(path).facts["identity"]["preprocess"]["buckets"]


def earlier_settings(now):
    """LatentOptions.settings as version 0.1 had it."""

    def settings(self, model, device):
        return replace(now(self, model, device), buckets=self.earlier_buckets(model))

    return settings


def test_a_picture_that_only_is_called_like_a_mask_is_a_row(tmp_path):
    keys = write_pictures(tmp_path / "in", 1)
    write(tmp_path / "in", "gas-mask.png")
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.masks, len(keys)) == (2, {}, 1)
