"""An index in a folder: complete at any moment, of one model, with damage detected."""

import dataclasses
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from modeling_rice import RiceGallery
from retrieval_rice.index import GalleryIndex
from retrieval_rice.index.calibration import Calibration
from retrieval_rice.index.table import ShopTable, State, columns_of, rows_of


@pytest.fixture
def saved(shop, tmp_path):
    """An index of ten images in memory, a copy of which is in a folder."""
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows, progress=False)
    index.save(tmp_path / "index")
    return index


@pytest.fixture
def folder(saved, tmp_path):
    return tmp_path / "index"


def load(folder, shop, **settings):
    return GalleryIndex.load(folder, shop.model, shop.processor, **settings)


def hits(index, clips):
    return [[(hit.image_id, hit.score, hit.confidence) for hit in answer.hits] for answer in index.search(clips)]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_loaded_index_gives_the_same_answers(saved, folder, shop, tmp_path):
    clips = shop.clips(1, 2)
    # An untrained decoder is never sure.
    saved.calibrate(shop.clips(*range(10), *range(10)), [[f"p{i % 10}"] for i in range(20)], false_accept_rate=0.5)
    saved.save(folder, overwrite=True)
    again = load(folder, shop)
    assert len(again) == 10 and hits(again, clips) == hits(saved, clips)
    assert again.calibration == saved.calibration
    again.save(tmp_path / "copy")
    assert hits(load(tmp_path / "copy", shop), clips) == hits(saved, clips)
    # Its own place needs no saving.
    version = again.version
    again.save(folder)
    assert again.version == version


def test_encodings_of_any_kind_round_trip_bit_for_bit(tmp_path):
    @dataclasses.dataclass(repr=False, eq=False)
    class Gallery(RiceGallery):
        patches: torch.Tensor | None = None
        mask: torch.Tensor | None = None
        places: torch.Tensor | None = None

    Gallery.fields = ("embeds", "patches", "mask", "places")

    features = Gallery(
        embeds=torch.randn(5, 3).half(),
        patches=torch.randn(5, 2, 4),
        mask=torch.rand(5, 2) > 0.5,
        places=torch.arange(10).reshape(5, 2),
    )
    table, fields = ShopTable(tmp_path), columns_of(features)
    table.create(fields, State(None))
    records = [{"image_id": f"p{i}", "live_ids": [], "position": i} for i in range(5)]
    records.insert(2, {"image_id": "bad", "reason": "it is no picture", "position": 9, "live_ids": ["x"]})
    table.upsert(rows_of(records, features, fields))
    snapshot = table.snapshot()
    rows = snapshot.read(None, "reason IS NULL").sort_by("position")
    read = snapshot.features(rows, Gallery)
    for name in Gallery.fields:
        assert torch.equal(getattr(read, name), getattr(features, name))
        assert getattr(read, name).dtype == getattr(features, name).dtype
    (bad,) = snapshot.read(None, "reason IS NOT NULL").to_pylist()
    assert bad["embeds"] is None and bad["patches"] is None and bad["live_ids"] == ["x"]


def test_an_older_version_is_restored_with_its_calibration(folder, shop):
    index = load(folder, shop)
    clips = shop.clips(1, 2)
    weights = [1.0, 1.0] if index.search(clips)[0].hits[0].matching_score is not None else [1.0]
    index.calibration = first = Calibration(2.0, 0.5, weights, threshold=0.3)
    number, before = index.version, hits(index, clips)
    index.calibration = Calibration(1.0, -3.0, weights)
    index.remove(["p1", "p2"])
    assert hits(index, clips) != before
    index.restore(number)
    assert index.calibration == first and hits(index, clips) == before and len(load(folder, shop)) == 10
    with pytest.raises(ValueError, match="has no version 999"):
        index.restore(999)
    with pytest.raises(ValueError, match="was not complete in version 1"):
        index.restore(1)
    assert [version.rows for version in index.versions()[-2:]] == [8, 10]


def test_what_another_process_wrote_is_found(folder, shop):
    reader, slow, writer = load(folder, shop, refresh_s=0), load(folder, shop, refresh_s=1e9), load(folder, shop)
    writer.add([{**shop.rows[3], "image_id": "new", "live_id": "z"}])
    assert reader.search(shop.clips(3), live_id="z")[0].hits[0].image_id == "new"
    assert slow.search(shop.clips(3), live_id="z")[0].hits == []
    slow.refresh()
    assert slow.search(shop.clips(3), live_id="z")[0].hits[0].image_id == "new"


def test_changes_of_two_writers_are_kept(folder, shop):
    one, other = load(folder, shop), load(folder, shop)
    one.remove(["p1"])
    other.remove(["p2"])
    one.add([{**shop.rows[3], "image_id": "a"}])
    other.add([{**shop.rows[3], "image_id": "b"}])
    names = load(folder, shop).image_ids()
    assert names == ["p0", *(f"p{i}" for i in range(3, 10)), "a", "b"]


def test_the_cache_of_shops_is_bounded(folder, shop):
    index = load(folder, shop, cache_bytes=20_000)
    clip = shop.clips(1)
    expected = [hit.image_id for hit in index.search(clip, live_id="x", rerank=None)[0].hits]
    for i in range(50):
        assert index.search(clip, live_id=f"nobody {i}")[0].hits == []
    assert index._newest.rooms().cached_bytes <= 20_000
    assert [hit.image_id for hit in index.search(clip, live_id="x", rerank=None)[0].hits] == expected


@pytest.mark.parametrize("name", ["it's", 'a "quoted" one', "x') OR (true", "ünï", "a\\b", "x\ny"])
def test_livestreams_may_have_any_name(shop, name):
    rows = [{**shop.rows[0], "live_id": name, "image_id": f"{name} 0"}, *shop.rows[1:]]
    index = GalleryIndex.build(shop.model, shop.processor, rows, progress=False)
    assert [hit.image_id for hit in index.search(shop.clips(0), live_id=name)[0].hits] == [f"{name} 0"]
    assert index.remove([f"{name} 0"]) == [] and len(index) == 9


def test_an_index_of_another_model_is_refused(folder, make_index_model):
    with pytest.raises(ValueError, match="was encoded by another model, fingerprint .*build it again") as error:
        GalleryIndex.load(folder, make_index_model(seed=2))
    assert len(str(error.value).splitlines()) == 1


def test_another_index_is_not_overwritten(folder, shop):
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows[:3], progress=False)
    with pytest.raises(FileExistsError, match="exists already"):
        index.save(folder)
    index.save(folder, overwrite=True)
    assert len(load(folder, shop)) == 3


def test_an_index_of_an_earlier_format_is_refused(shop, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"format": "rice-gallery-index", "version": 1}))
    for use in (
        lambda: load(tmp_path, shop),
        lambda: GalleryIndex.build(shop.model, shop.processor, shop.rows, output_dir=tmp_path, overwrite=True),
    ):
        with pytest.raises(ValueError, match="earlier version.* delete the folder .* build it again"):
            use()


def test_a_folder_without_an_index(shop, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index in .* build one with `rice index"):
        load(tmp_path, shop)


def test_a_full_disk_leaves_the_index_unchanged(folder, shop):
    index = load(folder, shop)
    before, clips = files(folder), shop.clips(1)
    answer = hits(index, clips)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = shop.make_rows(40)
    steps = (
        lambda: index.add([{**row, "title": "much text " * 400} for row in rows[10:]]),
        lambda: index.save(folder.parent / "copy"),
        lambda: index.approximate("hnsw"),
        lambda: GalleryIndex.build(
            shop.model, shop.processor, rows, output_dir=folder, progress=False, dtype="float32",
            overwrite=True,
        ),
    )  # fmt: skip
    for step in steps:
        # The kernel then refuses to write on, as it does where there is no room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="could not be written .*its previous version is unchanged") as error:
                step()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(str(error.value).splitlines()) == 1
        assert files(folder) == before and hits(load(folder, shop), clips) == answer
    index.add(rows[10:])
    assert len(load(folder, shop)) == 40


def damaged(folder, kind, rng):
    """Damages a file of the table, every other time one of encodings, and returns it."""
    path = rng.choice(rng.choice([files(folder), files(folder / "images.lance" / "data")]))
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return path


def attack(saved, folder, shop, count, seed=0):
    """
    Damages copies of an index, and uses and mends each as the sentences say. Returns how often it was noticed.
    """
    rng, clips, noticed = random.Random(seed), shop.clips(1, 4), 0
    expected = hits(saved, clips)
    for number in range(count):
        copy = folder.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        path = damaged(copy, rng.choice(["missing", "cut", "flipped"]), rng)
        try:
            assert hits(load(copy, shop), clips) == expected, (number, path)
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1 and "rice index" in str(error), error
            noticed += 1
        options = {"output_dir": copy, "progress": False}
        try:
            index = GalleryIndex.build(shop.model, shop.processor, shop.rows, **options)
        except (ValueError, OSError) as error:
            assert "--overwrite" in str(error), error
            index = GalleryIndex.build(shop.model, shop.processor, shop.rows, **options, overwrite=True)
        scores = [[(hit.image_id, round(hit.score, 2)) for hit in answer.hits] for answer in index.search(clips)]
        assert scores == [[(name, round(score, 2)) for name, score, _ in one] for one in expected], (number, path)
    return noticed


def test_a_damage_is_reported_and_repaired_as_advised(saved, folder, shop):
    assert attack(saved, folder, shop, 6) > 0


@pytest.mark.slow
def test_many_damages_are_reported_and_repaired_as_advised(saved, folder, shop):
    assert attack(saved, folder, shop, 150, seed=1) > 20


@pytest.mark.parametrize("size", [2**30, 0])
def test_a_flipped_bit_of_an_encoding_is_detected(saved, folder, shop, size):
    (path,) = folder.glob("images.lance/data/*.lance")
    stored = saved._newest.rooms().snapshot.read()["embeds"].combine_chunks().flatten().to_numpy()
    data = bytearray(path.read_bytes())
    place = data.index(stored[:16].tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: 1 row.* such as 'p0'; run the same `rice index` again"):
        load(folder, shop, cache_bytes=size).search(shop.clips(0), rerank=None)
    # Only that one is encoded anew.
    encode, count = shop.model.encode_gallery, []
    shop.model.encode_gallery = lambda **inputs: count.append(len(inputs["pixel_values"])) or encode(**inputs)
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows, output_dir=folder, progress=False)
    assert count == [1]
    found = [hit.image_id for hit in index.search(shop.clips(0))[0].hits]
    assert found == [hit.image_id for hit in saved.search(shop.clips(0))[0].hits]


STATE = State("f" * 32, calibration=Calibration(1.0, 0.0, [1.0]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "presence_prior": -5}}, "presence_prior must be"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "temperature": 0}}, "temperature must be a finite"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "threshold": 7}}, "threshold must be a finite"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "weights": [None]}}, "a weight must be a finite"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "weights": []}}, "one or two numbers"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "rerank": 2.5}}, "rerank must be a whole number"),
        ({"calibration": {**dataclasses.asdict(STATE.calibration), "false_accept_rate": 2}}, "false_accept_rate must"),
        ({"calibration": {"temperature": 1.0}}, "a calibration must have the fields"),
        ({"calibration": math.nan}, "it holds NaN"),
        ({"model_fingerprint": ...}, "its metadata has "),
        ({"complete": 1}, "a value of the wrong kind for complete"),
        ({"format": 99}, "its format is 99"),
    ],
)
def test_metadata_of_a_table_is_checked(change, words):
    values = json.loads(STATE.to_metadata()[b"rice"]) | change
    text = json.dumps({name: value for name, value in values.items() if value is not ...}).encode()
    metadata = {b"rice": text, b"rice.crc32": str(zlib.crc32(text)).encode()}
    with pytest.raises(ValueError, match=words):
        State.from_metadata(metadata)
    with pytest.raises(ValueError, match="does not match the checksum"):
        State.from_metadata({**metadata, b"rice": text + b" "})


def test_numbers_that_are_not_finite_are_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        State(None, approximate={"recall@10": math.inf}).to_metadata()
    assert State.from_metadata(STATE.to_metadata()) == STATE


def test_embeddings_that_are_not_finite_are_refused(shop):
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows, progress=False)
    features = index._newest.rooms().search(shop.clips(0), [None], 1)[0].features
    features.embeds[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        index.put([{"image_id": "x"}], features)


def test_forked_workers_print_no_warning(folder):
    # The library warns in the forked process, which this test's process cannot record.
    code = f"""
import os
from retrieval_rice.index.table import ShopTable
assert ShopTable({str(folder)!r}).versions()
child = os.fork()
if not child:
    os._exit(0)  # as a loader's worker does
os.waitpid(child, 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "fork" not in ended.stderr
