"""Candidates of any kind become the same gallery, and scores become ranked lists."""

import numpy as np
import pandas as pd
import pytest
import torch

from evaluation_rice.fusion import fuse_scores
from evaluation_rice.retrieval import model_scores
from modeling_rice.ranking_rice import best_first, default_ranking, encode_candidates, pair_scores


class Processor:
    """Takes pictures that are processed already, and remembers the titles."""

    def __init__(self):
        self.titles = []

    def __call__(self, images=None, videos=None, titles=None, asr=None):
        self.titles += titles or []
        data = (
            {"pixel_values": torch.stack(list(images))} if images is not None else {"pixel_values_videos": videos[0]}
        )
        return Inputs(data)


class Inputs(dict):
    def to(self, device):
        return self


@pytest.fixture
def encoded(make_model, make_batch):
    model, batch = make_model(), make_batch(size=5)
    gallery = model.encode_gallery(batch["pixel_values"])
    return model, batch, gallery, model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])


def test_images_a_gallery_and_a_saved_gallery_are_the_same_candidates(encoded, tmp_path):
    model, batch, gallery, _ = encoded
    gallery.save(tmp_path / "shop.safetensors")
    processor = Processor()
    for candidates in (list(batch["pixel_values"]), gallery, tmp_path / "shop.safetensors"):
        found = encode_candidates(model, processor, candidates)
        torch.testing.assert_close(found.states, gallery.states)
        assert found.model_fingerprint == gallery.model_fingerprint


@pytest.mark.parametrize("column", [list, tuple, lambda titles: pd.Series(titles, index=range(7, 137)), np.array])
def test_many_images_are_encoded_in_parts_with_their_titles(make_model, make_batch, column):
    model, pixels = make_model(), make_batch(size=5)["pixel_values"]
    processor, titles = Processor(), [str(i) for i in range(130)]
    gallery = encode_candidates(model, processor, [pixels[i % 5] for i in range(130)], column(titles))
    assert len(gallery) == 130 and processor.titles == titles
    torch.testing.assert_close(gallery.embeds[125:], model.encode_gallery(pixels).embeds, atol=1e-5, rtol=0)


def test_candidates_that_cannot_be_ranked_are_refused(encoded, tmp_path):
    model, batch, gallery, _ = encoded
    with pytest.raises(ValueError, match="`candidates` is empty"):
        encode_candidates(model, Processor(), [])
    with pytest.raises(ValueError, match="`titles` has 2 entries for 5 candidates"):
        encode_candidates(model, Processor(), list(batch["pixel_values"]), ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no feature file"):
        encode_candidates(model, Processor(), str(tmp_path / "none.safetensors"))


def test_only_the_most_similar_images_are_matched(encoded):
    model, _, gallery, clips = encoded
    exact, cosines = pair_scores(model, clips, gallery, "matching")
    scores, _ = pair_scores(model, clips, gallery, "matching", candidates=2)
    kept = cosines.argsort(dim=1, descending=True)[:, :2]
    assert (scores > float("-inf")).sum(dim=1).tolist() == [2] * 5
    torch.testing.assert_close(scores.gather(1, kept), exact.gather(1, kept))
    torch.testing.assert_close(exact, model.match(clips, gallery))
    for ranked in pair_scores(model, clips, gallery, "embedding", candidates=2):
        torch.testing.assert_close(ranked, model.similarity(clips, gallery))


TEXTS = {"text_embed_dim": 6, "text_score_weight": 0.5}


@pytest.mark.parametrize("settings", [{}, TEXTS, TEXTS | {"fused_text_weight": 3.0}])
def test_fused_scores_are_those_of_the_evaluation(make_model, make_batch, settings):
    model, batch = make_model(fusion_weight=0.7, **settings), make_batch(size=5)
    titles, asr = ({"title_embeds": torch.randn(5, 6)}, {"asr_embeds": torch.randn(5, 6)}) if settings else ({}, {})
    for embeds in asr.values():
        # A clip without ASR.
        embeds[1] = 0
    gallery = model.encode_gallery(batch["pixel_values"], **titles)
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"], **asr)
    scores, cosines = pair_scores(model, clips, gallery, "fused")
    known = model_scores(model, clips, gallery)
    assert len(known) == (4 if settings else 2)
    for row in range(5):
        of_clip = {kind: values[row] for kind, values in known.items()}
        expected = fuse_scores(of_clip, 0.7, settings.get("fused_text_weight"))
        assert scores[row].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    kept = cosines[0].topk(2).indices
    few, _ = pair_scores(model, clips, gallery, "fused", candidates=2)
    alone, _ = pair_scores(model, clips[0], gallery[kept], "fused")
    assert (few[0] > float("-inf")).sum() == 2
    torch.testing.assert_close(few[0, kept], alone[0].to(few.dtype))
    same, _ = pair_scores(model, clips, gallery[[0, 0]], "fused")
    assert (same[:, 0] == same[:, 1]).all() and same.isfinite().all()


def test_the_fused_score_needs_a_weight_and_is_then_the_default(make_model, encoded):
    model, batch, gallery, clips = encoded
    assert default_ranking(model) == "matching" and default_ranking(make_model(use_decoder=False)) == "embedding"
    assert default_ranking(make_model(fusion_weight=0.7)) == "fused"
    with pytest.raises(ValueError, match="`config.fusion_weight` is missing"):
        pair_scores(model, clips, gallery, "fused")
    blind = make_model(use_decoder=False, fusion_weight=0.7)
    with pytest.raises(ValueError, match="decoder"):
        pair_scores(
            blind,
            blind.encode_clips(batch["pixel_values_videos"]),
            blind.encode_gallery(batch["pixel_values"]),
            "fused",
        )


def test_best_first_keeps_the_order_of_ties_and_drops_what_was_not_scored():
    scores = torch.tensor([1.0, 3.0, 1.0, float("-inf"), 2.0])
    assert best_first(scores) == [1, 4, 0, 2] and best_first(scores, 2) == [1, 4]
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        best_first(scores, 0)


def test_rank_lists_images_as_a_cross_encoder_does(encoded):
    model, batch, gallery, _ = encoded
    clip = batch["pixel_values_videos"][:1]
    expected = model.match(model.encode_clips(clip), gallery)[0]
    ranked = model.rank(clip, list(batch["pixel_values"]), processor=Processor())
    assert [entry["corpus_id"] for entry in ranked] == expected.argsort(descending=True).tolist()
    assert [entry["score"] for entry in ranked] == pytest.approx(expected.sort(descending=True).values.tolist())
    assert [entry["corpus_id"] for entry in model.rank(clip, gallery, 2, processor=Processor())] == [
        entry["corpus_id"] for entry in ranked[:2]
    ]


def test_rank_needs_a_decoder(make_model, make_batch):
    model, batch = make_model(use_decoder=False), make_batch()
    with pytest.raises(ValueError, match="no matching decoder"):
        model.rank(batch["pixel_values_videos"][:1], list(batch["pixel_values"]), processor=Processor())
