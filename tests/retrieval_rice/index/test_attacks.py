"""Kills at any moment, and concurrent writers and readers: no committed data is lost, and no change is half done."""

import multiprocessing
import os
import random
import runpy
import signal
import threading
import time
import zlib
from types import SimpleNamespace

import torch

from modeling_rice import RiceClips, RiceGallery
from retrieval_rice.index import GalleryIndex
from retrieval_rice.index.table import ShopTable

# Children begin at once, in a process that has imported everything, and are no forks of one that has the library.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["retrieval_rice.index", "lance_namespace", "pandas"])
WIDTH = 8


def model():
    """Compares embeddings and nothing else."""
    config = SimpleNamespace(use_decoder=False)
    return SimpleNamespace(config=config, similarity=lambda clips, gallery: clips.embeds @ gallery.embeds.float().T)


def put(index, names, live="x"):
    """Images whose embedding follows from their name."""
    embeds = torch.stack([embedding(name) for name in names])
    index.put([{"image_id": name, "live_ids": [live]} for name in names], RiceGallery(embeds=embeds))


def embedding(name):
    return torch.nn.functional.normalize(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))), dim=0
    )


def found(index, name, live=None):
    return index.search(RiceClips(embeds=embedding(name)[None]), live_id=live, rerank=0)[0].hits[0].image_id


def start(function, *arguments):
    """A function of this file in a child process, and the end of a pipe into which it tells what is written."""
    here, there = CONTEXT.Pipe(duplex=False)
    call = {"call": (function.__name__, there, *arguments)}
    child = CONTEXT.Process(target=runpy.run_path, args=(__file__, call, "child"), daemon=True)
    child.start()
    there.close()
    return child, here


def kill(child, pipe, rng):
    """Kills a child at any moment after a few of its steps, unless it ends before; returns all that it told."""
    told, last = [], rng.randint(2, 7)
    try:
        while True:
            told.append(pipe.recv())
            if len(told) == last:
                time.sleep(rng.uniform(0.0, 0.05))
                os.kill(child.pid, signal.SIGKILL)
    except EOFError:
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return [one for one in told if one != "begun"]


def new_index(folder, count=40):
    index = GalleryIndex(model())
    put(index, [f"p{i}" for i in range(count)])
    index.save(folder)
    return GalleryIndex.load(folder, model(), refresh_s=0)


def add_for_ever(pipe, folder, first):
    index = GalleryIndex.load(folder, model())
    pipe.send("begun")
    for number in range(first, first + 10_000):
        put(index, [f"new{number}"])
        pipe.send(f"new{number}")


def compact_for_ever(pipe, folder):
    index = GalleryIndex.load(folder, model())
    pipe.send("begun")
    for number in range(10_000):
        # Each round writes some of what is there once more, which leaves small files to be joined.
        for i in (0, 20):
            put(index, [f"p{j}" for j in range(i, i + 20)])
            pipe.send(number)
        index.compact()
        pipe.send(number)


def build_slowly(pipe, folder, shop_model, processor, rows):
    encode = shop_model.encode_gallery

    def slowly(**inputs):
        pipe.send("begun")
        time.sleep(0.02)
        return encode(**inputs)

    shop_model.encode_gallery = slowly
    options = {"progress": False, "batch_size": 2, "commit_every": 2}
    GalleryIndex.build(shop_model, processor, rows, output_dir=folder, **options)


def survive_adding(folder, kills, rng):
    index, told = new_index(folder), []
    for number in range(kills):
        child, pipe = start(add_for_ever, folder, 10_000 * number)
        told += kill(child, pipe, rng)
        names = GalleryIndex.load(folder, model()).image_ids()
        assert len(names) == len(set(names)) and set(names) >= {*told, *(f"p{i}" for i in range(40))}
    put(index, ["after"])
    assert all(found(index, name) == name for name in ["after", "p7", *told[-3:]])
    return told


def survive_compacting(folder, kills, rng):
    index = new_index(folder)
    for _ in range(kills):
        child, pipe = start(compact_for_ever, folder)
        kill(child, pipe, rng)
        again = GalleryIndex.load(folder, model())
        assert again.image_ids() == [f"p{i}" for i in range(40)]
        assert [found(again, f"p{i}") for i in range(0, 40, 7)] == [f"p{i}" for i in range(0, 40, 7)]
    index.compact()
    assert len(index) == 40


def survive_building(shop, folder, kills, rng):
    """Every kill loses at most the images of one commit, and the last run has the shop."""
    rows = shop.make_rows(30)

    kept = 0
    for _ in range(kills):
        child, pipe = start(build_slowly, folder, shop.model, shop.processor, rows)
        kill(child, pipe, rng)
        if ShopTable(folder).exists():
            count = len(ShopTable(folder).snapshot().read(["image_id"]))
            assert count >= kept
            kept = count
    index = GalleryIndex.build(shop.model, shop.processor, rows, output_dir=folder, progress=False)
    whole = GalleryIndex.build(shop.model, shop.processor, rows, progress=False)
    assert index.image_ids() == whole.image_ids()
    clips = shop.clips(3, 11)
    for one, other in zip(index.search(clips), whole.search(clips)):
        assert [hit.image_id for hit in one.hits] == [hit.image_id for hit in other.hits]
    return kept


def test_kills_lose_nothing(shop, tmp_path):
    rng = random.Random(0)
    assert survive_adding(tmp_path / "added", 2, rng)
    survive_compacting(tmp_path / "compacted", 2, rng)
    assert survive_building(shop, tmp_path / "built", 2, rng) > 0


def write_some(pipe, folder, name, count):
    """The writer's own images, and some that the other one writes, too."""
    index = GalleryIndex.load(folder, model())
    pipe.send("begun")
    for number in range(count):
        put(index, [f"{name}{number}", f"both{number}"])
    pipe.send("done")


def test_two_writers_keep_each_others_changes(tmp_path):
    index = new_index(tmp_path / "index")
    children = [start(write_some, tmp_path / "index", name, 8) for name in "ab"]
    index.compact()
    assert [[pipe.recv(), pipe.recv()] for _, pipe in children] == [["begun", "done"]] * 2
    expected = {f"{name}{i}" for name in ("a", "b", "both") for i in range(8)} | {f"p{i}" for i in range(40)}
    names = index.image_ids()
    assert len(names) == len(expected) and set(names) == expected


def write_pairs(pipe, folder, seconds):
    """Two images at a time, and the files put in order in between."""
    index, number = GalleryIndex.load(folder, model()), 0
    pipe.send("begun")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        put(index, [f"left{number}", f"right{number}"], live="pairs")
        if number % 3 == 2:
            index.remove([f"left{number - 1}", f"right{number - 1}"])
            index.compact()
        pipe.send((number, time.time()))
        number += 1
    pipe.send(None)


def read_until_none(index, pipe):
    """Searches while another process writes, and returns how often, and after how many seconds a write was found."""
    searches, latest = 0, 0.0
    clip = RiceClips(embeds=embedding("left0")[None])
    while True:
        names = [hit.image_id for hit in index.search(clip, live_id="pairs", top_k=1000, rerank=0)[0].hits]
        left, right = ({n.removeprefix(side) for n in names if n.startswith(side)} for side in ("left", "right"))
        assert left == right
        searches += 1
        while pipe.poll():
            told = pipe.recv()
            if told is None:
                return searches, latest
            number, written = told
            # Every third pair is taken out again.
            if number % 3 != 1:
                assert found(index, f"left{number}", "pairs") == f"left{number}"
                latest = max(latest, time.time() - written)


def test_a_reader_sees_only_complete_changes(tmp_path):
    index = new_index(tmp_path / "index")
    child, pipe = start(write_pairs, tmp_path / "index", 2.0)
    assert pipe.recv() == "begun"
    searches, latest = read_until_none(index, pipe)
    child.join()
    assert searches > 10 and 0 < latest < 10


def test_threads_search_while_the_index_changes(tmp_path):
    index, end, failures, counts = new_index(tmp_path / "index"), threading.Event(), [], [0] * 4

    def search(thread):
        try:
            while not end.is_set():
                name = f"p{random.randrange(40)}"
                assert found(index, name) == name == found(index, name, "x")
                assert len(index.live_ids()) >= 1 and len(index.records([name])) == 1
                counts[thread] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(10):
        put(index, [f"new{number}"], live=f"live {number}")
        if number % 3 == 2:
            index.remove([f"new{number - 1}"])
            index.compact()
    end.set()
    for thread in threads:
        thread.join()
    assert not failures and min(counts) > 0
    assert len(index) == 47


if __name__ == "child":
    name, pipe, *arguments = globals()["call"]
    torch.set_num_threads(1)
    globals()[name](pipe, *arguments)
