"""A model with an alignment in the index, in streams and in the demo: the same scores as in one call of the model."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_rice.scoring_rice import ranked_scores
from retrieval_rice.demo.page import Demo, table_rows
from retrieval_rice.index import GalleryIndex
from retrieval_rice.recogniser import Recogniser
from retrieval_rice.stream.source import Frame


@pytest.fixture
def aligned(make_index_model):
    model = make_index_model(use_decoder=False, alignment_weight=1.0, alignment_rank=6, vision_feature_layer=0)
    generator = torch.Generator().manual_seed(0)
    images, frames = (torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2))
    model.fit_alignment([images], [frames])
    return model


@pytest.fixture
def pictures(make_shop_rows):
    rows = make_shop_rows()
    return rows, [Image.open(row["image"]["path"]).convert("RGB") for row in rows]


def clips_of(model, processor, pictures, *numbers):
    return model.encode_clips(**processor(videos=[[pictures[i], pictures[i].rotate(5)] for i in numbers]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_search_ranks_as_the_model_does(aligned, index_processor, pictures, tmp_path, dtype, where):
    rows, shop = pictures
    clips = clips_of(aligned, index_processor, shop, 0, 3, 7)
    folder = tmp_path / "index" if where == "folder" else None
    index = GalleryIndex.build(aligned, index_processor, rows, progress=False, dtype=dtype, output_dir=folder)
    if folder is not None:
        index = GalleryIndex.load(folder, aligned)
    gallery = aligned.encode_gallery(**index_processor(images=shop))
    expected, known = ranked_scores(aligned, clips, gallery)
    for i, answer in enumerate(index.search(clips)):
        order = [int(hit.image_id[1:]) for hit in answer.hits]
        assert order == expected[i].argsort(descending=True).tolist()
        np.testing.assert_allclose([hit.score for hit in answer.hits], expected[i][order], atol=5e-3)
        np.testing.assert_allclose(
            [hit.alignment_score for hit in answer.hits], known["alignment"][i][order], atol=1e-3
        )
        assert all(hit.matching_score is None for hit in answer.hits)
    plain = index.search(clips[0], rerank=0)[0].hits[0]
    assert plain.alignment_score is None and plain.score == plain.embedding_score


def test_an_image_takes_two_bytes_per_number_of_its_patches(aligned, index_processor, pictures):
    for dtype, width in (("float16", 2), ("float32", 4)):
        index = GalleryIndex.build(aligned, index_processor, pictures[0], progress=False, dtype=dtype)
        snapshot = index._newest.rooms().snapshot
        assert snapshot.row_bytes == width * 16 + 2 * 16 * 6


def test_only_the_best_by_embedding_are_aligned_and_one_livestream_is_searched(aligned, index_processor, pictures):
    rows, shop = pictures
    index = GalleryIndex.build(aligned, index_processor, rows, progress=False)
    clips = clips_of(aligned, index_processor, shop, 4)
    hits = index.search(clips, top_k=3, rerank=3)[0].hits
    gallery = aligned.encode_gallery(**index_processor(images=shop))
    nearest = aligned.similarity(clips, gallery)[0].topk(3).indices.tolist()
    assert {int(hit.image_id[1:]) for hit in hits} == set(nearest)
    assert {hit.live_id for hit in index.search(clips, live_id="y")[0].hits} == {"y"}


def test_confidences_are_fitted_on_the_alignment(aligned, index_processor, make_shop_rows):
    rows = make_shop_rows(12)
    index = GalleryIndex.build(aligned, index_processor, rows, progress=False)
    shop = [Image.open(row["image"]["path"]).convert("RGB") for row in rows]
    clips = clips_of(aligned, index_processor, shop, *range(12))
    report = index.calibrate(clips, [[row["image_id"]] for row in rows], progress=False)
    assert report["num_present"] == 12
    answer = index.search(clips[0])[0]
    assert 0 <= answer.confidence <= 1 and answer.hits[0].alignment_score is not None


def test_a_stream_shares_frames_and_scores_like_a_clip(aligned, index_processor, pictures):
    rows, shop = pictures
    index = GalleryIndex.build(aligned, index_processor, rows, progress=False)
    recogniser = Recogniser(aligned, index_processor, index)
    frames = [Frame(float(second), shop[2]) for second in range(12)]
    segments = list(recogniser.stream(frames, window_s=4.0, hop_s=1.0, fps=1.0))
    best = recogniser.recognise([shop[2]] * 2).hits[0]
    assert {segment.hit.image_id for segment in segments} == {best.image_id}


def test_the_demos_heat_is_the_alignment(aligned, index_processor, pictures, demo_queries, tmp_path):
    rows, shop = pictures
    index = GalleryIndex.build(aligned, index_processor, rows, progress=False)
    demo = Demo(aligned, index_processor, index, rows, demo_queries, str(tmp_path))
    assert demo.explains
    recognition = demo.recognise(demo.example("x", 0), "x")
    assert table_rows(recognition)[0][-2:] == ["", f"{recognition.answer.hits[0].alignment_score:.3f}"]
    pair = demo.pair(recognition, 0)
    assert pair.maps.is_alignment and pair.maps.grid == (4, 4)
    weights = pair.maps.weights
    assert weights.min() >= 0
    # Of all patches the heat is that of the best match.
    best = weights.max(axis=(0, 1))
    np.testing.assert_allclose(pair.maps.heat(), (best - best.min()) / (best.max() - best.min()), rtol=1e-5)
    picture, frames = demo.heat(pair, (1, 2))
    assert len(frames) == len(pair.frames) and picture.size == pair.picture.size
