"""Sources, models, plans and amounts that repair refuses before anything is written."""

import json
import shutil

import pytest
from support.repairs import OPTIONS, changed, flip, mend, state
from support.small_store import SIDE, picture, small_vae, write_pictures
from support.store_checks import committed

from fastvae.data.encoding.encode import encode
from fastvae.data.store.errors import IdentityMismatch, StoreError, StoreLocked
from fastvae.data.store.leases import Leases


def test_a_source_is_asked_for_in_a_sentence_and_nothing_is_changed(made):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(ValueError, match=r"src must be named, since 1 units of .*out are encoded again .*repair .*SRC"):
        mend(made)
    with pytest.raises(ValueError, match="since 1 units and 1 images that failed of "):
        mend(made, retry_failed=True)
    assert changed(before, state(made)) == set()


def test_another_model_is_refused_and_nothing_is_changed(made, tmp_path):
    small_vae(seed=1).save_pretrained(tmp_path / "other")
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(IdentityMismatch, match="encoder_weights_sha256"):
        mend(made, tmp_path / "in", vae=tmp_path / "other")
    facts = json.loads((made / "store.json").read_text())  # the folder that it names holds other weights now
    facts["source"]["vae"] = str(tmp_path / "other")
    (made / "store.json").write_text(json.dumps(facts))
    before = state(made)
    with pytest.raises(IdentityMismatch, match="encoder_weights_sha256"):
        mend(made, tmp_path / "in")
    assert changed(before, state(made)) == set()


def test_another_source_is_refused_before_anything_is_lost(made, tmp_path):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    write_pictures(tmp_path / "elsewhere" / "deeper", 2)
    with pytest.raises(ValueError, match=r"src must hold the images that .* none of the 4 that are damaged is in"):
        mend(made, tmp_path / "elsewhere")
    assert changed(before, state(made)) == set()


@pytest.mark.parametrize("hash_files", ["none", "full"])
def test_other_pictures_of_the_same_names_are_never_taken_for_those_that_were_planned(first, tmp_path, hash_files):
    fixed = {"buckets": SIDE, "dtype": "fp32", "shard_mb": 0.002, "max_failures": 1, "hash": hash_files}
    shutil.copytree(first / "in", tmp_path / "in")
    encode(tmp_path / "in", tmp_path / "out", vae=first / "vae", **fixed, **OPTIONS)
    flip(tmp_path / "out" / "shards" / f"000001-{SIDE}x{SIDE}.safetensors")
    (tmp_path / "other").mkdir()
    for number, path in enumerate(sorted((tmp_path / "in").glob("*.png"))):
        picture(100 + number).save(tmp_path / "other" / path.name)
    before = state(tmp_path / "out")
    with pytest.raises(ValueError, match=r"src must hold the images as they were planned: \d+ of \d+ in damaged units"):
        mend(tmp_path / "out", tmp_path / "other", vae=first / "vae")
    assert state(tmp_path / "out") == before


def test_records_whose_plan_is_gone_are_not_deleted(made, tmp_path):
    for path in (made / "plan").iterdir():
        path.unlink()
    before = state(made)
    with pytest.raises(StoreError, match=r"records with a shard beside them are of no unit in .*plan: put the missing"):
        mend(made, tmp_path / "in")
    assert state(made) == before


@pytest.mark.parametrize("wrong", [{"max_failures": "abc"}, {"workers": 0}, {"batch": "many"}, {"max_pixels": 0}])
def test_a_wrong_amount_is_refused_before_anything_is_done(made, tmp_path, wrong):
    flip(made / "shards" / "000000-32x32.safetensors")
    before = state(made)
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be "):
        mend(made, tmp_path / "in", **wrong)
    assert changed(before, state(made)) == set()


def test_a_running_writer_is_waited_for_by_the_user(made, tmp_path):
    flip(made / "shards" / "000000-32x32.safetensors")
    with (
        Leases(made / "leases") as other,
        pytest.raises(StoreLocked, match=f"is being written, lease run-{other.owner}"),
    ):
        mend(made, tmp_path / "in")
    assert mend(made, tmp_path / "in").units == [0]


def test_row_13_an_edited_plan_opens_nothing_outside_the_source(made, tmp_path):
    """The damaged unit of somebody else's store names a user's picture outside the source: it is quarantined."""
    picture(9).save(tmp_path / "private.png")
    (plan,) = (made / "plan").iterdir()
    plan.write_text(plan.read_text().replace('"000.png"', '"../private.png"'))
    flip(made / "shards" / "000000-32x32.safetensors")
    done = mend(made, tmp_path / "in", max_failures=2)
    assert (done.report.ok, done.report.reasons["unreadable"]) == (3, 1)
    assert not {key for key, _ in committed(made)} & {"../private.png", "000.png"}


def test_the_models_name_is_printed_before_it_is_opened(made, tmp_path, capsys):
    flip(made / "shards" / "000000-32x32.safetensors")
    facts = json.loads((made / "store.json").read_text())
    facts["source"]["vae"] = f"{tmp_path}/\x1b[2Jgone\nfastvae: all is well"
    (made / "store.json").write_text(json.dumps(facts))
    with pytest.raises((OSError, ValueError)):
        mend(made, tmp_path / "in")
    said = capsys.readouterr().err
    assert f"model   {tmp_path}/?[2Jgone fastvae: all is well: named by the store; --vae takes another\n" in said
    facts["source"]["subfolder"] = ["vae"]
    (made / "store.json").write_text(json.dumps(facts))
    with pytest.raises(StoreError, match=r"source\.subfolder, source\.revision and source\.preset must be text"):
        mend(made, tmp_path / "in")


def test_a_store_of_an_object_needs_the_model(tmp_path):
    write_pictures(tmp_path / "in", 2)
    encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), buckets=SIDE, dtype="fp32", **OPTIONS)
    flip(tmp_path / "out" / "shards" / "000000-32x32.safetensors")
    with pytest.raises(ValueError, match="vae must be given: the store was made with a AutoencoderKL object"):
        mend(tmp_path / "out", tmp_path / "in")
    assert mend(tmp_path / "out", tmp_path / "in", vae=small_vae()).report.ok == 2


def test_an_edited_scaling_is_refused_where_no_whole_shard_is_left_to_contradict_it(made, tmp_path):
    """The model shows the edit: new shards would record the edited scaling."""
    facts = json.loads((made / "store.json").read_text())
    facts["scaling"]["scaling_factor"], facts["metadata"]["scaling_factor"] = 0.5, "0.5"
    (made / "store.json").write_text(json.dumps(facts))
    for shard in (made / "shards").glob("*.safetensors"):
        flip(shard)
    before = state(made)
    with pytest.raises(StoreError, match=r"store.json was edited: .*scaling_factor"):
        mend(made, tmp_path / "in")
    assert state(made) == before
