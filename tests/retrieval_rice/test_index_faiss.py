"""Approximate search finds what exact search finds, also after images came and went."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_rice import RiceClips, RiceGallery
from retrieval_rice.index import GalleryIndex

pytest.importorskip("faiss")

COUNT, WIDTH = 1200, 32


def clustered(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(9))
    values = centres[torch.randint(60, (count,), generator=generator)]
    values = values + 0.7 * torch.randn(count, WIDTH, generator=generator)
    return torch.nn.functional.normalize(values, dim=1)


def put(index, embeds, prefix="p"):
    records = [
        {"image_id": f"{prefix}{i}", "product_id": "", "live_ids": ["xy"[i % 2]], "title": "", "image": ""}
        for i in range(len(embeds))
    ]
    index.store.put(records, RiceGallery(embeds=embeds.half()), [])


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
def test_what_is_found_is_what_exact_search_finds(index, clips, kind, settings):
    exact = ids(index.search(clips, rerank=0))
    index.approximate(kind, progress=False, **settings)
    found = index.search(clips, rerank=0)
    assert recall(ids(found), exact) > 0.95
    # Scores are the model's own, not those of rounded codes, and so is the order.
    for answer in found:
        scores = [hit.score for hit in answer.hits]
        assert scores == sorted(scores, reverse=True)
    assert index.approximate(None) is index and ids(index.search(clips, rerank=0)) == exact


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_images_that_come_and_go_are_followed(index, clips, kind, settings):
    index.approximate(kind, progress=False, **settings)
    gone = [answer.hits[0].image_id for answer in index.search(clips)]
    assert index.remove(gone) == []
    put(index, clips.embeds, prefix="new")
    found = index.search(clips, rerank=0)
    assert [answer.hits[0].image_id for answer in found] == [f"new{i}" for i in range(20)]
    expected = ids(index.approximate(None).search(clips, rerank=0))
    assert recall(ids(found), expected) > 0.95
    assert not {image for images in ids(found) for image in images} & set(gone)


def test_livestreams_are_searched_exactly(index, clips):
    expected = ids(index.search(clips, live_id="x", rerank=0))
    index.approximate("hnsw", progress=False)
    index.store.approximate.search = None
    assert ids(index.search(clips, live_id="x", rerank=0)) == expected


def test_the_graph_is_saved_and_loaded(index, model, clips, tmp_path):
    index.approximate("hnsw", progress=False, ef_search=64)
    index.remove(["p3", "p1001"])
    index.save(tmp_path / "index")
    again = GalleryIndex.load(tmp_path / "index", model)
    assert again.store.approximate.settings.ef_search == 64 and len(again) == COUNT - 2
    assert ids(again.search(clips, rerank=0)) == ids(index.search(clips, rerank=0))
    path = next((tmp_path / "index").glob("*.faiss"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        GalleryIndex.load(tmp_path / "index", model)


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("lsh", {}, "kind must be one of hnsw, ivfpq"),
        ("hnsw", {"links": 0}, "links must be at least 1"),
        ("ivfpq", {"code_bytes": 7}, "does not divide the 32"),
    ],
)
def test_mistakes_get_one_sentence(index, kind, settings, words):
    with pytest.raises(ValueError, match=words):
        index.approximate(kind, progress=False, **settings)


def test_an_empty_index_has_nothing_to_approximate(model):
    with pytest.raises(ValueError, match="has no images"):
        GalleryIndex(model).approximate(progress=False)
