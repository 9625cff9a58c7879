"""Candidates of any kind become the same gallery, which `rank` lists by the model's own choice of score."""

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_rice import comparison_rice
from modeling_rice.comparison_rice import encode_candidates
from modeling_rice.scoring_rice import ranked_scores


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


def test_invalid_candidates_are_refused(encoded, tmp_path):
    model, batch, gallery, _ = encoded
    with pytest.raises(ValueError, match="`candidates` is empty"):
        encode_candidates(model, Processor(), [])
    with pytest.raises(ValueError, match="`titles` has 2 entries for 5 candidates"):
        encode_candidates(model, Processor(), list(batch["pixel_values"]), ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no feature file"):
        encode_candidates(model, Processor(), str(tmp_path / "none.safetensors"))


def test_encodings_on_other_devices_are_moved_to_the_model(make_model, make_batch, monkeypatch):
    """The meta device stands for a GPU; it has no autocast."""
    monkeypatch.setattr(comparison_rice, "cosines", lambda rows, columns: rows @ columns.T)
    model, batch = make_model(text_embed_dim=4, text_score_weight=0.5), make_batch(text_dim=4)
    gallery, clips = model.encode_gallery(**batch), model.encode_clips(**batch)
    model.to("meta")
    assert model.similarity(clips, gallery.to("meta")).is_meta
    assert model.text_similarity(clips, gallery).is_meta


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
    with pytest.raises(ValueError, match="`titles` belong to shop images, and a gallery was given"):
        model.rank(clip, gallery, processor=Processor(), titles=["a"] * len(gallery))


@pytest.mark.parametrize("settings", [{"use_decoder": False}, {"fusion_weight": 0.7}, {"ranking": "embedding"}])
def test_rank_follows_the_config_unless_told_otherwise(make_model, make_batch, settings):
    model, batch = make_model(**settings), make_batch()
    clip, gallery = batch["pixel_values_videos"][:1], model.encode_gallery(batch["pixel_values"])
    clips = model.encode_clips(clip)
    kind = settings.get("ranking") or ("fused" if "fusion_weight" in settings else "embedding")
    for rank_by in (None, kind, "embedding"):
        expected = ranked_scores(model, clips, gallery, rank_by or kind)[0][0]
        ranked = model.rank(clip, gallery, processor=Processor(), rank_by=rank_by)
        assert [entry["corpus_id"] for entry in ranked] == expected.argsort(descending=True).tolist()


def test_rank_refuses_a_score_that_the_model_lacks(make_model, make_batch):
    model, batch = make_model(use_decoder=False), make_batch()
    with pytest.raises(ValueError, match="no matching decoder"):
        model.rank(
            batch["pixel_values_videos"][:1], list(batch["pixel_values"]), processor=Processor(), rank_by="matching"
        )
