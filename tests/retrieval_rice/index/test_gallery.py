"""Searching an index: the same as scoring the whole shop, in its order, and after images were added and removed."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_rice import RiceClips, RiceGallery
from modeling_rice.scoring_rice import FusionWeights
from retrieval_rice.index import GalleryIndex, search
from retrieval_rice.index.calibration import Calibration
from retrieval_rice.index.search import best_rows


@pytest.fixture
def build(shop):
    def make(rows=None, **options):
        rows = shop.rows if rows is None else rows
        return GalleryIndex.build(shop.model, shop.processor, rows, progress=False, **options)

    return make


def encode(shop, rows):
    from data_rice.collator import RiceCollator

    return shop.model.encode_gallery(**RiceCollator(shop.processor).collate_gallery(rows)[0])


def found(answer):
    return [hit.image_id for hit in answer.hits]


def test_hits_are_those_of_scoring_the_whole_shop(shop, build):
    clips, gallery = shop.clips(3, 4, 7), encode(shop, shop.rows)
    index = build(dtype="float32")
    embedding, matching = shop.model.similarity(clips, gallery).numpy(), shop.model.match(clips, gallery).numpy()
    for i, answer in enumerate(index.search(clips, top_k=10, rerank=None)):
        order = np.argsort(-matching[i], kind="stable")
        assert found(answer) == [shop.rows[row]["image_id"] for row in order]
        np.testing.assert_allclose([hit.matching_score for hit in answer.hits], matching[i][order], atol=1e-4)
        assert [hit.score for hit in answer.hits] == [hit.matching_score for hit in answer.hits]
        np.testing.assert_allclose([hit.embedding_score for hit in answer.hits], embedding[i][order], atol=1e-5)


def test_only_the_nearest_are_matched(shop, build):
    index, clips = build(dtype="float32"), shop.clips(5)
    nearest = shop.model.similarity(clips, encode(shop, shop.rows))[0].argsort(descending=True)[:3]
    answer = index.search(clips, top_k=2, rerank=3)[0]
    assert len(answer.hits) == 2
    assert set(found(index.search(clips, top_k=3, rerank=3)[0])) == {f"p{i}" for i in nearest.tolist()}
    assert answer.timings["search_ms"] > 0 and answer.timings["match_ms"] > 0
    plain = index.search(clips, top_k=3, rerank=0)[0]
    assert found(plain) == [f"p{i}" for i in nearest.tolist()]
    assert plain.hits[0].matching_score is None and plain.hits[0].score == plain.hits[0].embedding_score


def test_half_precision_changes_scores_little(shop, build):
    clips = shop.clips(0, 1, 2)
    full, half = build(dtype="float32").search(clips, rerank=None), build().search(clips, rerank=None)
    for one, other in zip(full, half):
        scores = {hit.image_id: hit.embedding_score for hit in other.hits}
        assert all(abs(scores[hit.image_id] - hit.embedding_score) < 1e-3 for hit in one.hits)


def test_a_livestream_is_searched_alone(shop, build):
    index, clips = build(), shop.clips(2, 3)
    assert index.live_ids() == ["x", "y"]
    for answer in index.search(clips, live_id="y", rerank=None):
        assert sorted(found(answer)) == ["p1", "p3", "p5", "p7", "p9"]
        assert {hit.live_id for hit in answer.hits} == {"y"}
    first, second = index.search(clips, live_id=["x", None], rerank=None)
    assert len(first.hits) == 5 and len(second.hits) == 10
    assert len(index.search(clips[0], live_id=[["x", "y"]], rerank=None)[0].hits) == 10


def test_a_livestream_without_a_shop_has_no_product(shop, build):
    answer = build().search(shop.clips(2), live_id="elsewhere")[0]
    assert answer.hits == [] and answer.no_product and answer.confidence == 0


def test_an_image_of_two_livestreams_is_one_image(shop, build):
    index = build([*shop.rows, {**shop.rows[0], "live_id": "y"}])
    assert len(index) == 10
    for live in "xy":
        hits = index.search(shop.clips(0), live_id=live, rerank=None)[0].hits
        assert next(hit for hit in hits if hit.image_id == "p0").live_id == live


def test_added_and_removed_images_give_the_index_of_the_changed_shop(shop, build):
    rows = shop.make_rows(14)
    index = build(rows[:10])
    clips = shop.clips(12, 1)
    assert index.add(rows[10:]) == []
    assert index.remove(["p1", "p11", "never", "p1"]) == ["never"]
    expected = build([row for row in rows if row["image_id"] not in ("p1", "p11")])
    assert len(index) == len(expected) == 12
    for one, other in zip(index.search(clips, rerank=None), expected.search(clips, rerank=None)):
        assert [dataclasses.astuple(hit) for hit in one.hits] == [dataclasses.astuple(hit) for hit in other.hits]
    assert index.remove([f"p{i}" for i in range(14)]) == ["p1", "p11"]
    assert len(index) == 0 and index.search(clips)[0].hits == []


def test_an_image_added_again_is_replaced_and_keeps_its_livestreams(shop, build):
    index = build()
    newer = {**shop.rows[0], "live_id": "z", "title": "new title", "image": shop.rows[5]["image"]}
    assert index.add([newer]) == [] and len(index) == 10
    hit = index.search(shop.clips(5), live_id="z")[0].hits[0]
    assert (hit.image_id, hit.title, hit.live_id) == ("p0", "new title", "z")
    assert index.records(["p0"])["p0"]["live_ids"] == ["x", "z"]
    # The picture is that of p5 now, so both are equally near; the gallery's order decides.
    near = index.search(shop.clips(5), rerank=0)[0].hits
    assert found_scores(near, "p0") == found_scores(near, "p5")


def found_scores(hits, image_id):
    return next(hit.embedding_score for hit in hits if hit.image_id == image_id)


def test_titles_of_a_livestream_and_of_all(shop, build, tmp_path):
    index = build()
    assert index.titles() == [f"title {i}" for i in range(10)]
    assert index.titles("y") == [f"title {i}" for i in range(1, 10, 2)] and index.titles("z") == []
    # A picture that could not be read is not searched, and its title is not expected.
    index.add([{"image_id": "p1", "title": "", "image": shop.rows[1]["image"], "live_id": "y"}])
    index.add([{"image_id": "gone", "title": "gone", "image": str(tmp_path / "gone.png"), "live_id": "y"}])
    assert index.titles("y")[:2] == ["", "title 3"] and "gone" not in index.titles()
    assert GalleryIndex(shop.model).titles() == []


def test_pictures_that_cannot_be_added_are_returned(shop, build, tmp_path):
    index = build()
    failures = index.add([{"image_id": "gone", "image": str(tmp_path / "gone.jpg")}])
    assert [failure["id"] for failure in failures] == ["gone"] == [failure["id"] for failure in index.skipped]
    assert "no such file" in failures[0]["reason"] and len(index) == 10


def test_pictures_may_be_objects_and_paths(shop, build):
    from PIL import Image

    rows = [{"image_id": "a", "image": Image.open(shop.rows[1]["image"]["path"])}]
    rows += [{"image_id": "b", "image": shop.rows[1]["image"]["path"], "product_id": "mug"}]
    hits = build(rows).search(shop.clips(1))[0].hits
    assert [(hit.product_id, hit.live_id) for hit in hits] == [("a", ""), ("mug", "")]
    assert hits[0].score == hits[1].score and hits[1].image.endswith("p1.png")


def test_a_model_without_a_decoder_ranks_by_embedding(shop, make_index_model):
    model = make_index_model(use_decoder=False)
    index = GalleryIndex.build(model, shop.processor, shop.rows, progress=False)
    clips = model.encode_clips(**shop.processor(videos=[[torch.zeros(3, 32, 32, dtype=torch.uint8)]]))
    hits = index.search(clips)[0].hits
    assert hits[0].matching_score is None and hits[0].score == max(hit.embedding_score for hit in hits)


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 2.0], [3.0, 1.0, 3.0, 3.0]])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_equal_scores_keep_the_order_of_the_gallery(scores, k):
    expected = sorted(range(4), key=lambda i: -scores[i])[:k]
    assert best_rows(torch.tensor(scores), k).tolist() == expected


@pytest.mark.parametrize("cache_bytes", [2**30, 30, 0])
def test_equal_scores_keep_their_order_over_chunks(monkeypatch, cache_bytes):
    """In memory, with the embeddings alone in memory, and read anew for each search."""
    monkeypatch.setattr(search, "CHUNK", 3)
    values = torch.randint(0, 3, (20, 1)).float()
    index = GalleryIndex(comparing_model(), cache_bytes=cache_bytes)
    for start, stop in ((0, 7), (7, 20)):
        index.put([{"image_id": str(i)} for i in range(start, stop)], RiceGallery(embeds=values[start:stop]))
    # Rows that are written again move to the end of the table, but not of the gallery.
    index.put([{"image_id": "3"}], RiceGallery(embeds=values[3:4]))
    candidates = index._newest.rooms().search(RiceClips(embeds=torch.ones(1, 1)), [None], 8)[0]
    expected = sorted(range(20), key=lambda i: -values[i].item())[:8]
    assert [int(record["image_id"]) for record in candidates.records] == expected
    assert candidates.features.embeds.tolist() == values[expected].tolist()


def test_an_index_without_images(shop, tmp_path):
    index = GalleryIndex(comparing_model())
    assert (len(index), index.live_ids(), index.skipped, index.calibration, index.version) == (0, [], [], None, 0)
    assert index.search(RiceClips(embeds=torch.ones(1, 2)))[0].no_product and index.remove(["p1"]) == ["p1"]
    for use in (index.compact, index.versions, index.approximate, lambda: index.save(tmp_path / "index")):
        with pytest.raises(ValueError, match="the index has no images"):
            use()


def test_mistakes_get_one_sentence(shop, build):
    index, clips = build(), shop.clips(1, 2)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        index.search(clips, top_k=0)
    for name, value in (("rerank", float("inf")), ("rerank", -1), ("top_k", 1.5), ("top_k", True), ("top_k", None)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            index.search(clips, **{name: value})
    with pytest.raises(ValueError, match="live_id has 1 entries for 2 clips"):
        index.search(clips, live_id=["x"])
    with pytest.raises(ValueError, match="single text"):
        index.remove("p1")
    with pytest.raises(ValueError, match="without a processor"):
        GalleryIndex(shop.model).add(shop.rows)
    other = shop.clips(1)
    other.model_fingerprint = "0" * 32
    with pytest.raises(ValueError, match="encoded by another model"):
        index.search(other)


def comparing_model():
    """A model that compares embeddings and nothing else."""
    config = SimpleNamespace(use_decoder=False)
    return SimpleNamespace(config=config, similarity=lambda clips, gallery: clips.embeds @ gallery.embeds.float().T)


def cosine_index(images):
    """An index of given embeddings, each a product of its own."""
    index = GalleryIndex(comparing_model())
    index.put([{"image_id": f"p{i}"} for i in range(len(images))], RiceGallery(embeds=images))
    return index


def test_confidences_are_fitted_and_low_for_missing_products():
    normalize = torch.nn.functional.normalize
    images = normalize(torch.randn(60, 32), dim=1)
    index, clips = cosine_index(images), RiceClips(embeds=normalize(images + 0.1 * torch.randn(60, 32), dim=1))
    uncalibrated = index.search(clips[0])[0]
    assert 0 < uncalibrated.confidence <= 1 and not uncalibrated.no_product
    with pytest.raises(ValueError, match="each of the 60 clips"):
        index.calibrate(clips)
    with pytest.raises(ValueError, match="presence_prior must be above 0 and below 1, got 1.5"):
        index.calibrate(clips[:40], [[f"p{i}"] for i in range(40)], presence_prior=1.5)
    strict = {"presence_prior": 0.5, "false_accept_rate": 0.05}
    report = index.calibrate(clips[:40], [[f"p{i}"] for i in range(40)], **strict)
    assert report["num_present"] == report["num_absent"] == 40 and report["false_accepts"] <= 0.05
    # Products that the fit has not seen.
    there = index.search(clips[40:])
    assert sum(answer.no_product for answer in there) <= 2
    assert np.mean([answer.confidence for answer in there]) > 0.8
    index.remove([f"p{i}" for i in range(40, 60)])
    gone = index.search(clips[40:])
    assert sum(answer.no_product for answer in gone) >= 17
    assert np.mean([answer.confidence for answer in gone]) < 0.3


def test_a_product_outside_the_candidates_still_counts_as_present():
    # Each clip lies at another image than its own, so that one candidate is never enough.
    images = torch.eye(40)
    index, clips = cosine_index(images), RiceClips(embeds=images.roll(1, dims=0))
    scored = index._scored(clips, [[f"p{i}"] for i in range(40)], [None] * 40, 1)
    assert [(clip.in_shop, clip.missed) for clip in scored] == [(True, True), (False, False)] * 40
    # With all of them it is found, and an image that is nowhere is in no shop.
    scored = index._scored(clips[:2], [["p0"], ["nowhere"]], [None] * 2, None)
    assert [(clip.in_shop, clip.missed) for clip in scored] == [(True, False)] + [(False, False)] * 3


@pytest.mark.parametrize("sizes", [(20, 21), (12, 25, 7)])
def test_livestreams_of_unequal_sizes_are_calibrated(sizes):
    """Numbers are finite, and answers are given; images of one product stand beside those of others."""
    count = sum(sizes)
    images = torch.nn.functional.normalize(torch.eye(count) + 0.05 * torch.randn(count, count), dim=1)
    lives = [f"live {number}" for number, size in enumerate(sizes) for _ in range(size)]
    index = GalleryIndex(comparing_model())
    index.put([{"image_id": f"p{i}", "live_ids": [live]} for i, live in enumerate(lives)], RiceGallery(embeds=images))
    clips = RiceClips(embeds=torch.nn.functional.normalize(images + 0.05 * torch.randn(count, count), dim=1))
    report = index.calibrate(clips, [[f"p{i}"] for i in range(count)], live_id=lives)
    fitted = index.calibration
    assert np.isfinite([fitted.temperature, fitted.bias, *fitted.weights]).all()
    assert report["answered"] > 0.9 and report["false_accepts"] < 0.1
    answers = index.search(clips, live_id=lives)
    assert np.mean([answer.no_product for answer in answers]) < 0.1


def test_calibrating_reads_rows(shop, build):
    rows = shop.make_rows(24)
    index = build(rows)
    queries = [
        {"clip_id": f"c{i}", "live_id": "xy"[i % 2], "frames": [row["image"]], "boxes": [None], "relevant": [f"p{i}"]}
        for i, row in enumerate(rows)
    ]
    queries.append({**queries[0], "clip_id": "broken", "frames": [{"path": "nowhere.jpg", "bytes": None}]})
    # An untrained decoder is never sure.
    report = index.calibrate(queries, progress=False, rerank=5, false_accept_rate=0.5)
    assert report["num_present"] == 24 and [failure["id"] for failure in report["unreadable"]] == ["broken"]
    assert (index.calibration.rerank, index.calibration.ranking) == (5, "matching")
    with pytest.raises(ValueError, match="ranked by matching scores, but these are ranked by embedding scores; cal"):
        index.search(shop.clips(1), rerank=0)
    index.model.config.ranking = "embedding"
    with pytest.raises(ValueError, match="calibrate it again, or rank by matching scores"):
        index.search(shop.clips(1))
    index.calibrate(queries, progress=False, rerank=5, false_accept_rate=0.5)
    assert index.search(shop.clips(1), rerank=0)[0].hits
    # An index from before does not say what it was fitted to.
    values = index.calibration.to_dict()
    del values["ranking"]
    assert Calibration.from_dict(values).ranking is None


@pytest.mark.parametrize("text_weight", [None, 0.0, 4.0])
def test_scores_are_those_of_the_evaluation_with_text(
    shop, make_index_model, make_shop_rows, demo_queries, text_config, text_weight
):
    """Also those of a clip without ASR and of images without a title."""
    from datasets import Dataset

    from data_rice.collator import RiceCollator
    from evaluation_rice.protocol import RetrievalTask
    from evaluation_rice.retrieval import Loading, ModelRetriever, retrieve

    weights = {"text_score_weight": 0.5, "fusion_weight": 0.7, "fused_text_weight": text_weight}
    model = make_index_model(text_config=text_config, **weights)
    weights = FusionWeights.of(model.config)
    rows = [{**row, "title": "" if i in (3, 4) else row["title"]} for i, row in enumerate(make_shop_rows(folder="t"))]
    queries = [{**row, "asr": "" if i in (2, 3) else row["asr"]} for i, row in enumerate(demo_queries)]
    collator = RiceCollator(shop.processor, use_text=True)
    index = GalleryIndex.build(model, shop.processor, rows, progress=False, dtype="float32")
    clips = model.encode_clips(**collator.collate_queries(queries)[0])
    answers = index.search(clips, top_k=5, rerank=None, live_id=[row["live_id"] for row in queries])

    datasets = Dataset.from_list(queries), Dataset.from_list(rows)
    task = RetrievalTask.from_datasets(*datasets, "live")
    loading = Loading(32, 0, quiet=True)
    rankings, _ = retrieve(ModelRetriever(model, collator), task, *datasets, loading=loading, weights=weights)
    for query, answer in zip(queries, answers, strict=True):
        assert found(answer) == rankings["fused"].rankings[query["clip_id"]]
        scores = rankings["fused"].top_scores[query["clip_id"]]
        np.testing.assert_allclose([hit.score for hit in answer.hits], scores, atol=1e-5)
    bare, _ = retrieve(
        ModelRetriever(model, RiceCollator(shop.processor)), task, *datasets, loading=loading, weights=weights
    )
    different = [query["clip_id"] for query in queries if differs(rankings, bare, query["clip_id"])]
    spoken = [query["clip_id"] for query in queries if query["asr"]]
    # Titles are tokens of the decoder too, which reads them for every clip.
    assert set(spoken) <= set(different)


def differs(rankings, others, clip_id):
    return rankings["fused"].top_scores[clip_id] != others["fused"].top_scores[clip_id]
