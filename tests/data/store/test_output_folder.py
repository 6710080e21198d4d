"""The output folder: files of the user stay, and only an empty folder or a store is accepted."""

import pytest
from support.small_store import SIDE, small_vae, write_pictures

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import IdentityMismatch, StoreError

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_the_users_files_in_the_output_stay(source, tmp_path):
    out = tmp_path / "out"
    encode(source, out, vae=small_vae(), **OPTIONS)
    own = [out / "notes.tmp.txt", out / "shards" / "mine.tmp.12.0123abcd", out / "backup" / "store.json.tmp.1.0123abcd"]
    (out / "backup").mkdir()
    for path in own:
        path.write_text("mine")
    leftover = out / "plan" / "units-00007.jsonl.tmp.12.0123abcd"
    leftover.write_text("half")
    encode(source, out, vae=small_vae(), **OPTIONS)
    assert [path.read_text() for path in own] == ["mine"] * 3
    assert not leftover.exists()


def test_a_folder_with_another_file_is_refused_whatever_its_name(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.tmp.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"neither empty nor a latent store: it holds diary\.tmp\.txt"):
        encode(source, out, vae=small_vae(), **OPTIONS)
    assert (out / "diary.tmp.txt").read_text() == "mine"
    (out / "diary.tmp.txt").rename(out / "store.json.tmp.12.0123abcd")  # what a killed run leaves
    assert encode(source, out, vae=small_vae(), **OPTIONS).ok == 2


def test_a_store_without_commits_is_replaced_by_another_identity(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(self, pixels):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastvae.data.encoding.encoder.MomentEncoder.start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode(source, out, vae=small_vae(), **OPTIONS)
    assert encode(source, out, vae=small_vae(1), **OPTIONS | {"buckets": 64}).ok == 2
    assert LatentDataset(out)[0]["mean"].shape == (4, 8, 8)
    with pytest.raises(IdentityMismatch):
        encode(source, out, vae=small_vae(), **OPTIONS)
