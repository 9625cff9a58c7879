"""What changes a model's name and what does not, and that features of another model are refused."""

import copy

import pytest
import torch

from modeling_rice import RiceClips, RiceGallery, RiceModel
from modeling_rice.fingerprint_rice import fingerprint


def encode(model, batch):
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    return clips, model.encode_gallery(batch["pixel_values"])


def test_a_copy_has_the_same_name(make_model, tmp_path):
    model = make_model()
    name = model.fingerprint()
    assert len(name) == 32 and int(name, 16) >= 0
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert RiceModel.from_pretrained(tmp_path, dtype=dtype).fingerprint() == name
    assert RiceModel.from_pretrained(tmp_path, attn_implementation="eager").fingerprint() == name
    assert copy.deepcopy(model).fingerprint() == name
    assert model.to(torch.bfloat16).fingerprint() == name


@pytest.mark.parametrize(
    "settings",
    [
        {"matching_scale": 7.0, "logit_scale_init_value": 3.0},
        {"matching_negatives": "all", "num_hard_negatives": 1},
        {"use_reconstruction": False, "fusion_weight": 0.5, "fused_text_weight": 3.0},
    ],
)
def test_settings_of_training_do_not_change_the_name(make_model, settings):
    model = make_model()
    other = make_model(**settings)
    other.load_state_dict(model.state_dict(), strict=False)
    assert other.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    "settings", [{"normalize_frames": False}, {"decoder_hidden_act": "relu"}, {"decoder_normalize_key_value": False}]
)
def test_settings_of_the_encoding_change_the_name(make_model, settings):
    model, other = make_model(), make_model(**settings)
    other.load_state_dict(model.state_dict(), strict=False)
    assert other.fingerprint() != model.fingerprint()


@pytest.mark.parametrize("fused", [False, True])
def test_every_training_step_changes_the_name(make_model, make_batch, fused):
    """Between evaluations too; fused optimisers write past what torch counts."""
    model = make_model(decoder_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    names = [model.eval().fingerprint()]
    for _ in range(3):
        model.train()(**make_batch()).loss.backward()
        optimizer.step()
        names.append(model.fingerprint())
        assert model.eval().fingerprint() == names[-1] == fingerprint(model)
    assert len(set(names)) == 4


def test_loading_other_weights_changes_the_name(make_model):
    model = make_model()
    name, state = model.fingerprint(), {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        model.decoder.cross_layer.mlp.fc1.weight.mul_(1.01)
    assert model.fingerprint() != name
    model.load_state_dict(state)
    assert model.fingerprint() == name


def test_features_of_another_model_are_refused(make_model, make_batch):
    model, batch = make_model(), make_batch()
    clips, gallery = encode(model, batch)
    other = make_model()
    with torch.no_grad():
        other.visual_projection.weight.mul_(1.5)
    other_clips, other_gallery = encode(other, batch)
    for compare in (model.similarity, model.match):
        compare(clips, gallery)
        with pytest.raises(ValueError, match="`gallery` was encoded by another model.* encode it anew"):
            compare(clips, other_gallery)
        with pytest.raises(ValueError, match="`clips` was encoded by another model"):
            compare(other_clips, gallery)
        other_gallery_of_unknown_origin = RiceGallery(embeds=other_gallery.embeds, states=other_gallery.states)
        assert compare(clips, other_gallery_of_unknown_origin).shape == (5, 5)


def test_features_from_before_a_training_step_are_refused(make_model, make_batch, tmp_path):
    model, batch = make_model(), make_batch()
    clips, gallery = encode(model, batch)
    for name, features in (("clips", clips), ("gallery", gallery)):
        features.save(tmp_path / name)
    with torch.no_grad():
        model.visual_projection.weight.add_(0.01)
    fresh, _ = encode(model, batch)
    with pytest.raises(ValueError, match="before its weights changed"):
        model.match(fresh, RiceGallery.load(tmp_path / "gallery"))
    with torch.no_grad():
        model.visual_projection.weight.copy_(make_model().visual_projection.weight)
    scores = model.match(RiceClips.load(tmp_path / "clips"), RiceGallery.load(tmp_path / "gallery"))
    assert scores.shape == (5, 5)


def test_offloaded_weights_have_no_name(make_model, make_batch):
    model, batch = make_model(), make_batch()
    clips, gallery = encode(model, batch)
    offloaded = make_model()
    offloaded.vision_model.to("meta")
    assert offloaded.fingerprint() is None
    assert offloaded.similarity(clips, gallery).shape == (5, 5)
