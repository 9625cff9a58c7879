"""An index on disk: whole at any moment, one writer at a time, of one model."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from retrieval_rice import index_files
from retrieval_rice.index import GalleryIndex


@pytest.fixture
def saved(shop, tmp_path):
    """An index of ten images in three shards, in memory and in a folder."""
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows, progress=False, shard_size=4)
    index.save(tmp_path / "index")
    return index


@pytest.fixture
def folder(saved, tmp_path):
    return tmp_path / "index"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def load(folder, shop):
    return GalleryIndex.load(folder, shop.model, shop.processor)


def hits(index, clips):
    return [[(hit.image_id, hit.score, hit.confidence) for hit in answer.hits] for answer in index.search(clips)]


def test_a_loaded_index_answers_as_the_saved_one(saved, folder, shop, tmp_path):
    clips = shop.clips(1, 2)
    saved.calibrate(shop.clips(*range(10), *range(10)), [[f"p{i % 10}"] for i in range(20)])
    saved.save(folder)
    again = load(folder, shop)
    assert len(again) == 10 and hits(again, clips) == hits(saved, clips)
    assert again.calibration == saved.calibration
    again.save(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(folder)


def test_encodings_stay_in_the_file(folder, shop):
    """Their storage is the mapped file, which can be seen in the process's map."""
    index = load(folder, shop)
    address = index.store.shards[0].features.embeds.data_ptr()
    for line in open("/proc/self/maps"):
        low, high = (int(value, 16) for value in line.split()[0].split("-"))
        if low <= address < high:
            assert "features-" in line
            return
    pytest.fail("the tensor is nowhere")


def test_only_changed_shards_are_written(folder, shop):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("features-*")}
    index = load(folder, shop)
    index.remove(["p0"])
    index.add([{**shop.rows[0], "image_id": "new"}])
    index.save(folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("features-*")}
    assert len(after) == 4 and len(before.items() & after.items()) == 2
    again = load(folder, shop)
    assert list(again.store.column("image_id")) == [f"p{i}" for i in range(1, 10)] + ["new"]


def test_an_index_of_another_model_is_refused(folder, shop, make_index_model):
    with pytest.raises(ValueError, match="was encoded by another model, fingerprint .*build it again") as error:
        GalleryIndex.load(folder, make_index_model(seed=2))
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_leaves_what_was_there(saved, folder, shop):
    before = contents(folder)
    saved.add(shop.make_rows(40)[10:])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then refuses to write on, as it does where there is no room.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match="could not be written .*what was there before is unchanged"):
            saved.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before and len(load(folder, shop)) == 10
    saved.save(folder)
    assert len(load(folder, shop)) == 40


@pytest.mark.parametrize("step", ["write_shard", "write_manifest", "_replace"])
def test_a_kill_leaves_what_was_there(saved, folder, shop, monkeypatch, step):
    saved.remove(["p0", "p5"])

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_files, step, killed)
    with pytest.raises(KeyboardInterrupt):
        saved.save(folder)
    monkeypatch.undo()
    assert len(load(folder, shop)) == 10
    saved.save(folder)
    assert len(load(folder, shop)) == 8
    # What the interrupted save left behind went with the next one.
    assert len(list(folder.glob("*.parquet"))) == 3 and not list(folder.glob(".writing-*"))


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_sent_away_until_the_first_is_gone(saved, folder, shop):
    writer = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process is writing to the index"):
            saved.save(folder)
        with pytest.raises(BlockingIOError, match="another process is writing"):
            GalleryIndex.build(shop.model, shop.processor, shop.rows, output_dir=folder, progress=False)
        assert len(load(folder, shop)) == 10
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    saved.save(folder)


def test_a_change_of_somebody_else_is_not_lost(folder, shop):
    one, other = load(folder, shop), load(folder, shop)
    one.remove(["p1"])
    one.save(folder)
    other.remove(["p2"])
    with pytest.raises(FileExistsError, match="was changed by another process"):
        other.save(folder)
    assert sorted(load(folder, shop).store.column("image_id")) == sorted(f"p{i}" for i in range(10) if i != 1)
    other.save(folder, overwrite=True)
    assert "p2" not in set(load(folder, shop).store.column("image_id"))


def test_another_index_is_not_overwritten(folder, shop):
    index = GalleryIndex.build(shop.model, shop.processor, shop.rows[:3], progress=False)
    with pytest.raises(FileExistsError, match="holds an index already"):
        index.save(folder)
    index.save(folder, overwrite=True)
    assert len(load(folder, shop)) == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda f: (f / "index.json").unlink(), FileNotFoundError, "there is no index in"),
        (lambda f: (f / "index.json").write_text("{"), ValueError, "is damaged"),
        (lambda f: (f / "index.json").write_text("{}"), ValueError, "not the manifest of an index"),
        (lambda f: cut(next(f.glob("features-*"))), ValueError, "cannot be read"),
        (lambda f: next(f.glob("features-*")).unlink(), FileNotFoundError, "no feature file"),
        (lambda f: cut(next(f.glob("images-*"))), ValueError, "is damaged"),
        (lambda f: next(f.glob("images-*")).unlink(), FileNotFoundError, "lacks images-"),
    ],
)
def test_damage_is_told_in_one_sentence(folder, shop, damage, error, words):
    damage(folder)
    with pytest.raises(error, match=words) as raised:
        load(folder, shop)
    assert len(str(raised.value).splitlines()) == 1


def test_an_index_of_a_newer_version_is_refused(folder, shop):
    manifest = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="newer version"):
        load(folder, shop)


def test_files_are_as_readable_as_the_user_makes_them(folder):
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {(folder / ".lock").stat().st_mode & 0o777}


def test_an_index_that_is_replaced_while_it_is_read(saved, folder, shop, monkeypatch):
    read, replaced = index_files.read_shard, []

    def read_late(*arguments):
        if not replaced:
            replaced.append(True)
            saved.remove([f"p{i}" for i in range(4)] + ["p5"])
            saved.save(folder)
        return read(*arguments)

    monkeypatch.setattr(index_files, "read_shard", read_late)
    assert len(load(folder, shop)) == 5
