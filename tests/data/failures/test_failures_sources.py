"""Failure modes 12 to 14, 26, 30, 31 and 33: sources, names of files, and network access."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from data.failures.corpus import EVERY_KIND, HOSTILE_NAMES, hostile_tar
from support.small_store import SIDE, picture, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.sources.folder import list_folder
from fastvae.data.sources.open import open_source
from fastvae.data.sources.storage import open_remote
from fastvae.data.store.errors import StoreError
from fastvae.system.terminal import CONTROL, strip_control_characters

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def everything_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_row_12_a_loop_of_three_links_ends_within_a_second(tmp_path):
    write_pictures(tmp_path / "a", 2)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir(exist_ok=True)
    for here, there in (("a", "b"), ("b", "c"), ("c", "a")):
        os.symlink(tmp_path / there, tmp_path / here / "on")
    started = time.monotonic()
    listing = list_folder(tmp_path)
    assert time.monotonic() - started < 1
    assert [file.key for file in listing.files] == ["a/000.png", "a/001.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every folder")
def test_row_12_a_folder_without_permission_is_passed_over(tmp_path):
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "closed", 1)
    (tmp_path / "closed").chmod(0)
    try:
        listing = list_folder(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert [file.key for file in listing.files] == ["000.png"]
    assert listing.unreadable == ["closed"]


def test_row_13_a_hostile_tar_of_two_hundred_members_writes_nothing_outside(tmp_path):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    images = hostile_tar(inside / "hostile.tar", 200)
    before = everything_under(tmp_path)
    report = encode(inside / "hostile.tar", inside / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.failed) == (images, 0)
    written = everything_under(tmp_path) - before
    assert {name for name in written if not name.startswith("deep/er/out")} == set()
    rows = committed(inside / "out")
    assert ("../../up0", 0) in rows
    assert ("/absolute1", 0) in rows
    names = {path.name for path in (inside / "out" / "shards").iterdir()}
    assert names == {"000000-32x32.safetensors", "000000-32x32.json"}


def test_row_13_hostile_keys_in_a_manifest_are_data_all_the_way_to_pictures(tmp_path):
    """Keys that lead out of a folder, control a terminal or end a line are stored unchanged, never used as a path."""
    from fastvae.data.decoding.decode import decode

    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "in" / "x.png")
    lines = [json.dumps({"key": key, "path": "in/x.png"}) for key in HOSTILE_NAMES]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    vae = small_vae()
    report = encode(tmp_path / "m.jsonl", tmp_path / "out", vae=vae, **OPTIONS)
    assert report.ok == len(HOSTILE_NAMES)
    assert {key for key, _ in committed(tmp_path / "out")} == set(HOSTILE_NAMES)
    before = everything_under(tmp_path)
    written = decode(tmp_path / "out", tmp_path / "png", rows=slice(0, None), vae=vae)
    assert {key for key, _ in written} == set(HOSTILE_NAMES)
    assert everything_under(tmp_path) - before == {"png", *(f"png/{path.name}" for _, path in written)}
    index = (tmp_path / "out" / "index.jsonl").read_text("ascii").splitlines()
    assert {json.loads(line)["key"] for line in index} == set(HOSTILE_NAMES)


@pytest.mark.parametrize("kind", ["by its key", "by its place"])
def test_row_13_an_edited_plan_opens_nothing_outside_the_source(tmp_path, kind):
    """The plan of somebody else's OUT names a picture of the user: it is not encoded."""
    vae, out = small_vae(), tmp_path / "out"
    write_pictures(tmp_path / "in", 2)
    picture(9).save(tmp_path / "private.png")
    lines = [json.dumps({"key": str(number), "path": f"in/00{number}.png"}) for number in range(2)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    source = tmp_path / ("in" if kind == "by its key" else "m.jsonl")
    encode(source, out, vae=vae, **OPTIONS)
    (plan,) = (out / "plan").iterdir()
    told = [json.loads(line) for line in plan.read_text().splitlines()]
    size = (tmp_path / "private.png").stat().st_size
    change = {"key": "../private.png"} if kind == "by its key" else {"place": "private.png"}
    plan.write_text("\n".join(json.dumps(line) for line in [told[0] | change | {"size": size}, told[1]]))
    for path in (out / "shards").iterdir():
        path.unlink()
    encode(source, out, vae=vae, limit=1, max_failures=2, **OPTIONS)
    private = tmp_path / "alone"
    private.mkdir()
    (tmp_path / "private.png").rename(private / "private.png")
    encode(private, tmp_path / "what it would be", vae=vae, **OPTIONS)
    (theirs,) = committed(tmp_path / "what it would be").values()
    assert theirs not in committed(out).values()
    # By its key it is a failure; by its place it is in a unit that a later unit has replaced.
    assert list(failures(out).values()) == (["unreadable"] if kind == "by its key" else [])


def test_row_13_an_edited_plan_has_no_other_bucket(tmp_path):
    write_pictures(tmp_path / "in", 1)
    out = tmp_path / "out"
    encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)
    (plan,) = (out / "plan").iterdir()
    plan.write_text(plan.read_text().replace("32x32", "99999x99999"))
    for path in (out / "shards").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="has a plan for 99999x99999, and its table of buckets has no such size"):
        encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS)


def test_row_14_the_number_of_keys_that_were_there_before_is_reported(tmp_path):
    for folder in ("a", "b"):
        write_pictures(tmp_path / "in" / folder, 2)
    lines = [json.dumps({"key": "same", "path": f"in/{name}"}) for name in ("a/000.png", "a/001.png", "b/000.png")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    report = encode(tmp_path / "m.jsonl", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.duplicate_keys) == (3, 2)
    assert "keys    2 were there before: kept apart as KEY~2 and so on" in report.lines()
    assert {key for key, _ in committed(tmp_path / "out")} == {"same", "same~2", "same~3"}


def test_row_26_an_edited_image_is_seen_by_its_time_alone(tmp_path):
    """The size is the same to the byte; only the modification time, in nanoseconds, differs."""
    vae = small_vae()
    (tmp_path / "in").mkdir()
    path, out = tmp_path / "in" / "a.bmp", tmp_path / "out"
    picture(0, 32, 32).save(path)
    encode(tmp_path / "in", out, vae=vae, **OPTIONS)
    first, status = committed(out), path.stat()
    picture(1, 32, 32).save(path)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    report = encode(tmp_path / "in", out, vae=vae, **OPTIONS)
    assert (report.ok, report.resumed) == (1, 0)
    (line,) = (json.loads(line) for line in (out / "index.jsonl").read_text().splitlines())
    assert line["shard"].startswith("000001-")
    assert first != committed_of(out, line["shard"])


@pytest.mark.parametrize("kind", ["a folder", "a manifest", "a tar", "a table"])
def test_row_26_with_hashes_edits_are_found_by_the_bytes(tmp_path, kind):
    """An edit that keeps size and time is seen in every kind of source; a new time alone encodes nothing."""
    vae, folder, out = small_vae(), tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    source = {
        "a folder": folder,
        "a manifest": tmp_path / "m.jsonl",
        "a tar": tmp_path / "a.tar",
        "a table": tmp_path / "a.parquet",
    }[kind]

    def write(seeds: tuple[int, int]) -> None:
        images = {}
        for name, seed in zip("ab", seeds, strict=True):
            picture(seed, 32, 32).save(folder / f"{name}.bmp")
            images[name] = (folder / f"{name}.bmp").read_bytes()
        if kind == "a manifest":
            source.write_text("\n".join(json.dumps({"key": name, "path": f"in/{name}.bmp"}) for name in images))
        elif kind == "a tar":
            with tarfile.open(source, "w") as tar:
                for name, data in images.items():
                    info = tarfile.TarInfo(f"{name}.bmp")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        elif kind == "a table":
            arrow = pytest.importorskip("pyarrow", reason="Parquet's reader is not installed")
            table = arrow.table({"key": list(images), "image": list(images.values())})
            pytest.importorskip("pyarrow.parquet").write_table(table, source, compression="none", use_dictionary=False)

    def set_time(seconds: int) -> None:
        for path in (*folder.iterdir(), *([source] if source.is_file() else [])):
            os.utime(path, (seconds, seconds))

    def run(**options):
        report = encode(source, out, vae=vae, **OPTIONS, **options)
        return report.ok, report.resumed

    write((0, 1))
    set_time(10**9)
    sizes = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert run(hash="full") == (2, 0)
    set_time(10**9 + 7)
    assert run(hash="full") == (0, 2)
    write((0, 2))
    set_time(10**9)
    assert {path: path.stat().st_size for path in sizes} == sizes
    assert run() == (0, 2)  # hashes are for this case
    assert run(hash="full") == (1, 1)
    assert run(hash="full") == (0, 2)


def committed_of(out: Path, shard: str) -> dict[tuple[str, int], bytes]:
    from support.store_checks import shard_rows

    return shard_rows(out / "shards" / shard)


GUARDED = """
import json, sys
from pathlib import Path

reached = []

def guard(event, arguments):
    # Addresses of the machine itself are an attempt as well: nothing is to be asked of anyone.
    names = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
    if event in (*names, "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        reached.append(f"{event} {arguments!r:.200}")
        raise RuntimeError(f"{event}: {arguments!r:.200}")

root = Path(sys.argv[1])
from fastvae.cli.main import cli
from support.small_store import SIDE, small_vae
import torch, numpy, PIL.Image, safetensors.torch
import fastvae.data.encoding.encode, fastvae.data.decoding.decode, fastvae.models
torch.set_num_threads(1)
sys.addaudithook(guard)

def run(*arguments):
    try:
        cli(list(map(str, arguments)), standalone_mode=False)
    except SystemExit as stop:
        assert not stop.code, arguments

run("encode", root / "in", root / "out", "--vae", root / "vae", "--buckets", SIDE, "--dtype", "fp32", "-q")
run("info", root / "out")
run("decode", root / "out", root / "png")
rows = fastvae.LatentDataset(root / "out")
loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=fastvae.collate)
assert sum(len(batch["key"]) for batch in loader) == 4
first, reached[:] = list(reached), []
# The guard sees what it is there for.
import pickle, socket
for attempt in (
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: pickle.loads(pickle.dumps(Path("x"))),
    lambda: __import__("os").system("true"),
):
    try:
        attempt()
    except RuntimeError:
        pass
print(json.dumps([first, [line.split(" ")[0] for line in reached]]))
"""


def test_row_30_no_network_no_pickle_and_no_other_process(forks, tmp_path):
    """Python's audit events of sockets, unpickling and processes, over encode, info, decode and a loader."""
    write_pictures(tmp_path / "in", 4)
    small_vae().save_pretrained(tmp_path / "vae")
    done = forks.run(GUARDED, tmp_path)
    assert done.returncode == 0, done.stderr
    reached, planted = json.loads(done.stdout.splitlines()[-1])
    assert reached == []
    assert planted == ["socket.getaddrinfo", "pickle.find_class", "os.system"]


URLS = (
    "http://169.254.169.254/latest/meta-data",
    "HTTPS://host/x.png",
    "ftp://host/x.png",
    "s3://bucket/x.png",
    "file:///etc/passwd",
    "local:///etc/passwd",
    "FILE:///etc/passwd",
)


@pytest.mark.parametrize("url", URLS)
def test_row_31_a_manifest_reaches_no_server(tmp_path, url, monkeypatch):
    """URLs are off by default, and an allowed scheme allows no other; local files are not URLs."""
    monkeypatch.setattr("fastvae.data.sources.jsonl.open_remote", lambda root: pytest.fail(f"{root} was opened"))
    (tmp_path / "m.jsonl").write_text(json.dumps({"key": "a", "uri": url}))
    for schemes in ((), ("gs",)):
        with pytest.raises(ValueError, match=r"m\.jsonl line 1: .*:// is not allowed(, write| unless)"):
            open_source(tmp_path / "m.jsonl", schemes=schemes).listing()


@pytest.mark.parametrize(
    "chained", ["simplecache::http://host/x.png", "zip://x.png::http://host/a.zip", "//host/x.png"]
)
def test_row_31_chained_urls_are_missing_paths(tmp_path, chained):
    (tmp_path / "m.jsonl").write_text(json.dumps({"key": "a", "uri": chained}) + "\n")
    picture(0).save(tmp_path / "b.png")
    with (tmp_path / "m.jsonl").open("a") as lines:
        lines.write(json.dumps({"key": "b", "uri": "b.png"}))
    if chained.startswith("zip://"):
        with pytest.raises(ValueError, match="zip:// is not allowed unless"):
            open_source(tmp_path / "m.jsonl").listing()
        return
    report = encode(tmp_path / "m.jsonl", tmp_path / "out", vae=small_vae(), max_failures=1, **OPTIONS)
    assert (report.ok, failures(tmp_path / "out")) == (1, {"a": "unreadable"})


def test_row_31_a_local_scheme_is_no_file_system_of_its_own():
    for url in ("file:///etc", "local:///etc"):
        with pytest.raises(ValueError, match="must be written as a path"):
            open_remote(url)


def test_row_33_hostile_names_cannot_drive_a_terminal(tmp_path):
    """Every hostile name, for an image and for a broken file: no control character is printed."""
    from click.testing import CliRunner

    from fastvae.cli.main import cli

    (tmp_path / "in").mkdir()
    vae, names = small_vae(), [name for name in HOSTILE_NAMES if "/" not in name and name not in ("..", ".png")]
    vae.save_pretrained(tmp_path / "vae")
    for number, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(EVERY_KIND["png"] if number % 2 else b"")
    command = ["encode", tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae", "--buckets", SIDE]
    shown = ""
    for arguments in (
        [*command, "--dtype", "fp32"],
        [*command, "--dtype", "fp32", "--json"],
        [*command, "--dtype", "fp32", "--on-error", "fail"],
        ["decode", tmp_path / "out", tmp_path / "png"],
        ["info", tmp_path / "out"],
    ):
        result = CliRunner().invoke(cli, [*map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        shown += result.stdout + result.stderr
    assert not CONTROL.search(shown.replace("\r", ""))  # the bar's own
    assert all(
        strip_control_characters(name) == "".join("?" if CONTROL.match(letter) else letter for letter in name)
        for name in names
    )
    index = (tmp_path / "out" / "index.jsonl").read_text("ascii")
    assert {json.loads(line)["key"] for line in index.splitlines()} == set(names[1::2])
