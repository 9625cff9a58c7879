"""Approximate search finds what exact search finds, also after images were added and removed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_rice import RiceClips, RiceGallery
from retrieval_rice.index import GalleryIndex
from retrieval_rice.index.table import Snapshot

COUNT, WIDTH = 1200, 32


def clustered(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(9))
    values = centres[torch.randint(60, (count,), generator=generator)]
    values = values + 0.7 * torch.randn(count, WIDTH, generator=generator)
    return torch.nn.functional.normalize(values, dim=1)


def put(index, embeds, prefix="p"):
    records = [{"image_id": f"{prefix}{i}", "live_ids": ["xy"[i % 2]]} for i in range(len(embeds))]
    index.put(records, RiceGallery(embeds=embeds.half()))


@pytest.fixture
def model():
    def similarity(clips, gallery):
        return clips.embeds.float() @ gallery.embeds.float().T

    config = SimpleNamespace(use_decoder=False, _commit_hash=None)
    return SimpleNamespace(config=config, similarity=similarity, fingerprint=lambda: None)


@pytest.fixture
def index(model):
    result = GalleryIndex(model)
    put(result, clustered(COUNT))
    return result


@pytest.fixture
def clips():
    return RiceClips(embeds=clustered(20, seed=5))


def ids(answers):
    return [[hit.image_id for hit in answer.hits] for answer in answers]


def recall(found, expected):
    return np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, expected)])


SETTINGS = [("hnsw", {}), ("ivfpq", {"code_bytes": 4, "lists": 8, "probes": 6, "oversample": 10})]


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_approximate_search_finds_the_exact_results(index, clips, kind, settings):
    exact = ids(index.search(clips, rerank=0))
    assert index.approximate(kind, **settings) > 0.95
    found = index.search(clips, rerank=0)
    assert recall(ids(found), exact) > 0.95
    # Scores are the model's own, not those of rounded codes, and so is the order.
    for answer in found:
        scores = [hit.score for hit in answer.hits]
        assert scores == sorted(scores, reverse=True)
    assert index.approximate(None) is None and ids(index.search(clips, rerank=0)) == exact


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_added_and_removed_images_are_searched_correctly(index, clips, kind, settings):
    index.approximate(kind, **settings)
    gone = [answer.hits[0].image_id for answer in index.search(clips)]
    assert index.remove(list(dict.fromkeys(gone))) == []
    put(index, clips.embeds, prefix="new")
    for _ in range(2):
        found = index.search(clips, rerank=0)
        assert [answer.hits[0].image_id for answer in found] == [f"new{i}" for i in range(20)]
        assert not {image for images in ids(found) for image in images} & set(gone)
        # The second time they are in the approximate index themselves.
        index.compact()
    index.approximate(None)
    assert recall(ids(found), ids(index.search(clips, rerank=0))) > 0.95


def test_livestreams_are_searched_exactly(index, clips, monkeypatch):
    expected = ids(index.search(clips, live_id="x", rerank=0))
    index.approximate("hnsw")
    monkeypatch.setattr(Snapshot, "nearest", None)
    assert ids(index.search(clips, live_id="x", rerank=0)) == expected


def test_equal_images_keep_the_order_of_the_gallery(index, clips):
    put(index, clips.embeds[:1].repeat(3, 1), prefix="same")
    put(index, clips.embeds[:1], prefix="same")
    index.approximate("hnsw")
    assert ids(index.search(clips[:1], rerank=0))[0][:3] == ["same0", "same1", "same2"]


def test_the_graph_belongs_to_its_version(index, model, clips, tmp_path):
    index.save(tmp_path / "index")
    index = GalleryIndex.load(tmp_path / "index", model)
    plain = index.version
    share = index.approximate("hnsw", ef_search=64)
    index.remove(["p3", "p1001"])
    again = GalleryIndex.load(tmp_path / "index", model)
    settings = again._newest.rooms().snapshot.state.approximate
    assert (settings["kind"], settings["effort"]["ef"], settings["recall@10"]) == ("hnsw", 64, share)
    assert ids(again.search(clips, rerank=0)) == ids(index.search(clips, rerank=0)) and len(again) == COUNT - 2
    index.restore(plain)
    again.refresh()
    assert again._newest.rooms().snapshot.state.approximate is None and len(again) == COUNT


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("lsh", {}, "kind must be one of hnsw, ivfpq"),
        ("hnsw", {"links": 0}, "links must be at least 1"),
        ("hnsw", {"ef_search": float("inf")}, "ef_search must be a whole number"),
        ("ivfpq", {"code_bytes": 7}, "does not divide the 32"),
    ],
)
def test_mistakes_get_one_sentence(index, kind, settings, words):
    with pytest.raises(ValueError, match=words):
        index.approximate(kind, **settings)


def test_an_empty_index_cannot_be_approximate(model):
    with pytest.raises(ValueError, match="has no images"):
        GalleryIndex(model).approximate()
