"""The same answers from Qdrant's embedded engine as from memory."""

import dataclasses
import warnings

import pytest

from retrieval_rice import index_qdrant
from retrieval_rice.index import GalleryIndex

pytest.importorskip("qdrant_client")


@pytest.fixture
def local(shop):
    return GalleryIndex.build(shop.model, shop.processor, shop.rows, progress=False)


@pytest.fixture
def connect(shop):
    stores = []

    def make(location=":memory:", model=None, **options):
        stores.append(index_qdrant.QdrantStore(str(location), "shop", model or shop.model, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def remote(local, connect, shop):
    store = connect()
    store.upload(local.store, progress=False)
    return GalleryIndex(shop.model, store, shop.processor)


def hits(answers):
    return [[dataclasses.astuple(hit) for hit in answer.hits] for answer in answers]


@pytest.mark.parametrize("live_id", [None, "x", ["y", None], [("x", "y"), "nowhere"]])
@pytest.mark.parametrize("rerank", [0, 3, 100, None])
def test_answers_are_identical(local, remote, shop, live_id, rerank):
    clips = shop.clips(1, 4)
    assert len(remote) == len(local) == 10 and remote.live_ids() == local.live_ids()
    expected = hits(local.search(clips, live_id, top_k=3, rerank=rerank))
    assert hits(remote.search(clips, live_id, top_k=3, rerank=rerank)) == expected


def test_batches_of_any_size_give_the_same(local, connect, shop, monkeypatch):
    monkeypatch.setattr(index_qdrant, "BATCH", 3)
    store = connect()
    store.upload(local.store, progress=False)
    # Repeated as after an interruption.
    store.upload(local.store, progress=False)
    assert len(store) == 10 and list(store.get(["p9", "none", "p0"])) == ["p9", "p0"]
    clips = shop.clips(2)
    assert hits(GalleryIndex(shop.model, store).search(clips)) == hits(local.search(clips))
    assert store.remove([f"p{i}" for i in range(9)] + ["none"]) == ["none"] and len(store) == 1


def test_images_come_and_go_alike(local, remote, shop, tmp_path):
    newer = {**shop.rows[0], "live_id": "z", "title": "new", "image": shop.rows[5]["image"]}
    more = [newer, *shop.make_rows(14)[10:], {"image_id": "gone", "image": str(tmp_path / "gone.png")}]
    clips = shop.clips(5, 12)
    for index in (local, remote):
        assert [failure["id"] for failure in index.add(more)] == ["gone"]
        assert index.remove(["p3", "p11", "never"]) == ["never"]
        assert len(index) == 12
    for live_id in (None, "z", "x"):
        assert hits(remote.search(clips, live_id)) == hits(local.search(clips, live_id))


def test_calibration_is_the_same(local, remote, shop):
    clips, relevant = shop.clips(*range(10), *range(10)), [[f"p{i % 10}"] for i in range(20)]
    assert local.calibrate(clips, relevant) == remote.calibrate(clips, relevant)
    assert hits(remote.search(clips)) == hits(local.search(clips))


def test_an_empty_collection_is_searched(connect, shop):
    index = GalleryIndex(shop.model, connect(), shop.processor)
    assert len(index) == 0 and index.live_ids() == [] and index.remove(["a"]) == ["a"]
    assert index.search(shop.clips(0))[0].no_product
    index.add(shop.rows[:2])
    assert len(index.search(shop.clips(0))[0].hits) == 2


def test_a_folder_keeps_images_and_is_of_one_process_and_one_model(local, connect, shop, make_index_model, tmp_path):
    store = connect(tmp_path / "engine")
    store.upload(local.store, progress=False)
    with pytest.raises(BlockingIOError, match="another process has the folder"):
        connect(tmp_path / "engine")
    store.close()
    with pytest.raises(ValueError, match="encoded by another model"):
        connect(tmp_path / "engine", model=make_index_model(seed=2))


def test_images_stay_when_the_engine_is_opened_again(local, connect, shop, tmp_path):
    store = connect(tmp_path / "engine")
    store.upload(local.store, progress=False)
    store.close()
    again = GalleryIndex(shop.model, connect(tmp_path / "engine"))
    clips = shop.clips(3)
    assert hits(again.search(clips)) == hits(local.search(clips))


def test_a_server_that_does_not_answer(connect):
    with pytest.raises(ConnectionError, match="Qdrant at http://127.0.0.1:9 did not do it") as error:
        connect("http://127.0.0.1:9", timeout=2)
    assert len(str(error.value).splitlines()) == 1


def test_mistakes_get_one_sentence(connect, remote, tmp_path):
    with pytest.raises(ValueError, match="quantization must be"):
        connect(quantization="int4")
    with pytest.raises(ValueError, match="in a database, which cannot be saved"):
        remote.save(tmp_path / "index")
    with pytest.raises(ValueError, match="in a database, which cannot be searched by FAISS"):
        remote.approximate()


def test_the_embedded_engine_does_not_chatter(local, connect, shop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = connect()
        store.upload(local.store, progress=False)
        GalleryIndex(shop.model, store).search(shop.clips(1), "x")
