"""Threads that decode, encode and write: order, errors, and the path of a GPU, with a fake encoder."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.encoding.batch_size import BatchSizes, choose_workers
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.pipeline import Encoding, chunks_of, encoded_chunks
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants
from fastvae.data.images.errors import ImageError
from fastvae.data.sources.open import open_source
from fastvae.data.store.plan import PlannedRow, Unit
from fastvae.system.devices import default_dtype, resolve_device
from fastvae.system.threads import BackgroundWriter, ordered_map


def test_results_come_in_order_and_not_far_ahead():
    started = []

    def slow_first(number):
        started.append(number)
        time.sleep(0.05 if number == 0 else 0)
        return number

    results = ordered_map(slow_first, range(100), workers=2)
    assert next(results) == 0
    assert max(started) <= 5  # 2 * workers waiting beside the one that was handed out
    assert list(results) == list(range(1, 100))


def test_an_error_ends_the_map_and_its_threads():
    def fails_at_three(number):
        if number == 3:
            raise RuntimeError("three")
        return number

    before = threading.active_count()
    seen = []
    with pytest.raises(RuntimeError, match="three"):
        seen.extend(ordered_map(fails_at_three, range(100), workers=2))
    assert threading.active_count() == before


def fail():
    raise OSError("disk")


@pytest.mark.parametrize("later", [0, 1], ids=["at the end", "by the next write"])
def test_a_writers_error_is_raised(later):
    with pytest.raises(OSError, match="disk"), BackgroundWriter() as writer:  # noqa: PT012 (the end is what raises)
        writer.submit(fail)
        for _ in range(later):
            writer.submit(lambda: None)
            pytest.fail("the error of the write before was not raised")


def test_no_more_than_one_write_is_under_way_when_submit_returns():
    """A third unit does not begin while the first is being written: a kill loses two at most."""
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    with BackgroundWriter() as writer:
        writer.submit(slow)
        assert done == []  # it does not wait for its own write
        threading.Timer(0.05, allowed.set).start()
        writer.submit(lambda: done.append("second"))
        assert done[0] == "first"
    assert done == ["first", "second"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImageError("empty", "x holds no bytes")])
def test_submitted_units_are_written_after_any_error(error):
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    threading.Timer(0.05, allowed.set).start()
    with pytest.raises((KeyboardInterrupt, ImageError)), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(slow)
        raise error
    assert done == ["first"]


def test_an_interruption_while_a_unit_waits_loses_no_finished_unit(monkeypatch):
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    def interrupted(future, timeout=None):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(slow)
        monkeypatch.setattr(Future, "result", interrupted)
        threading.Timer(0.05, allowed.set).start()
        writer.submit(lambda: done.append("second"))
    assert done == ["first", "second"]


class Launches:
    """Fake encoder of a GPU: returns before it is done, and takes at most ``most`` images a step."""

    device = torch.device("cuda")
    widest, dtype = 8, torch.float32

    def __init__(self, real, most=65_536):
        self.real, self.most = real, most
        self.callers, self.log, self.sizes = set(), [], []

    def start(self, pixels):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError(f"{len(pixels)} do not fit")
        self.callers.add(threading.get_ident())
        number = len(self.sizes)
        self.log.append(("start", number))
        self.sizes.append(len(pixels))
        pending = self.real.start(pixels)
        return SimpleNamespace(result=lambda: (self.log.append(("finish", number)), pending.result())[1])


@pytest.fixture
def reader(tmp_path):
    write_pictures(tmp_path / "in", 7)
    (tmp_path / "in" / "003.png").write_bytes(b"spoilt")
    return ImageReader(open_source(tmp_path / "in"), Buckets.parse(SIDE, 8), Variants(), "white", 8, 10**6)


@pytest.fixture
def real():
    return MomentEncoder(small_vae(), "fp32", torch.device("cpu"))


def one_unit(reader):
    return Unit(0, (SIDE, SIDE), tuple(map(PlannedRow, reader.source.listing().files)))


def encoded(reader, encoder, batch):
    encoding = Encoding(encoder, RowFormat(), BatchSizes(batch, encoder))
    units = [one_unit(reader)]
    return list(encoded_chunks(chunks_of(units, encoding.batches), reader, encoding, 2, 1)), encoding.batches


def test_the_way_of_a_gpu_gives_the_same_rows(reader, real):
    """One thread feeds the model batches that a pool decoded; here the device is a CPU under another name."""
    keys = [row.file.key for row in one_unit(reader).rows]
    rows = {}
    for encoder, batch in ((real, 1), (Launches(real), 1), (Launches(real), 3)):
        done, _ = encoded(reader, encoder, batch)
        assert [row.file.key for chunk in done for row in chunk.planned] == keys
        assert [chunk.last for chunk in done] == [False] * (len(done) - 1) + [True]
        assert [failure.key for chunk in done for failure in chunk.failures] == ["003.png"]
        rows[encoder is real, batch] = {row.key: row for chunk in done for row in chunk.rows}
        if encoder is not real:
            assert encoder.callers == {threading.get_ident()}
    for key, row in rows[True, 1].items():
        assert np.array_equal(row.mean, rows[False, 1][key].mean)
        # Another batch may be summed in another order: fp32 differences, seen as at most one step of half precision.
        step = np.spacing(np.abs(row.mean).max())
        assert np.abs(row.mean - rows[False, 3][key].mean).max() <= step


def test_a_gpu_begins_a_batch_before_the_one_before_is_collected(reader, real):
    encoder = Launches(real)
    encoded(reader, encoder, 2)
    finished = [encoder.log.index(("finish", number)) for number in range(3)]
    started = [encoder.log.index(("start", number)) for number in range(1, 4)]
    assert [begin < end for begin, end in zip(started, finished, strict=True)] == [True] * 3
    assert [encoder.log.index(("start", n + 2)) > finished[n] for n in range(2)] == [True] * 2  # and no further ahead


def test_a_batch_that_does_not_fit_is_halved_from_then_on(reader, real):
    encoder = Launches(real, most=2)
    done, batches = encoded(reader, encoder, 6)
    assert sorted(row.key for chunk in done for row in chunk.rows) == [f"{n:03d}.png" for n in (0, 1, 2, 4, 5, 6)]
    # Of the first six five can be read: 5 and 3 do not fit, then 2, 1 and 2 do, and later batches begin at 2.
    assert encoder.sizes == [2, 1, 2, 1]
    assert batches.halved == 2
    assert batches.as_dict() == {f"{SIDE}x{SIDE}": 2}
    whole, _ = encoded(reader, Launches(real), 1)
    wanted = {row.key: row.mean for chunk in whole for row in chunk.rows}
    for chunk in done:
        for row in chunk.rows:
            assert np.abs(row.mean - wanted[row.key]).max() <= np.spacing(np.abs(row.mean).max())


def test_a_single_image_that_does_not_fit_is_an_error(reader, real):
    with pytest.raises(torch.OutOfMemoryError, match="1 do not fit"):
        encoded(reader, Launches(real, most=0), 4)


def test_automatic_batches_follow_the_memory_that_is_free(monkeypatch):
    encoder = SimpleNamespace(device=torch.device("cuda"), widest=128, dtype=torch.float16)
    monkeypatch.setattr("fastvae.data.encoding.batch_size.free_memory", lambda device: 2**40)
    batches = BatchSizes("auto", encoder)
    assert (batches.size_for((512, 512)), batches.size_for((256, 1024)), batches.size_for((4096, 4096))) == (16, 16, 1)
    # 8 activations of 128 channels at 512x512 in fp16 are 512 MiB an image.
    monkeypatch.setattr("fastvae.data.encoding.batch_size.free_memory", lambda device: 4 * 2**30)
    assert BatchSizes("auto", encoder).size_for((512, 512)) == 5
    assert BatchSizes(7, encoder).size_for((512, 512)) == 7


@pytest.mark.parametrize(
    ("count", "workers", "expected"),
    [(100, "auto", (4, 1)), (2, "auto", (2, 2)), (100, 2, (2, 2)), (100, 8, (8, 1)), (0, "auto", (1, 4))],
)
def test_a_cpus_cores_are_shared_out(count, workers, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("fastvae.data.encoding.batch_size.free_memory", lambda device: 2**40)
    encoder = SimpleNamespace(device=torch.device("cpu"), widest=8, dtype=torch.float32, deterministic=False)
    report, batches = EncodeReport("out", "id", "fp32", None), BatchSizes("auto", encoder)
    choose_workers(report, batches, encoder, {(64, 64): count} if count else {}, workers)
    assert (report.workers, report.threads_per_worker) == expected
    assert batches.size_for((64, 64)) == 1


def test_streams_that_do_not_fit_in_memory_become_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("fastvae.data.encoding.batch_size.free_memory", lambda device: 2**30)
    encoder = SimpleNamespace(device=torch.device("cpu"), widest=128, dtype=torch.float32, deterministic=False)
    report = EncodeReport("out", "id", "fp32", None)
    choose_workers(report, BatchSizes("auto", encoder), encoder, {(256, 256): 100, (64, 64): 100}, "auto")
    # 8 activations of 128 channels at 256x256 in fp32 are 256 MiB; with as much again in reserve, two streams fit.
    assert (report.workers, report.threads_per_worker) == (2, 4)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:999"])
def test_a_missing_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device must be one of this machine's, .* got '{device}'"):
        resolve_device(device)


def test_devices():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_default_dtypes():
    assert default_dtype(torch.device("cuda")) == "fp16"
    assert default_dtype(torch.device("cpu")) in ("bf16", "fp32")
