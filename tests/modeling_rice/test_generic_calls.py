"""Calls that code makes which knows models in general: one modality, tuples, arguments of other models, bad counts."""

import numpy as np
import pytest
import torch
from transformers import BertConfig

from modeling_rice import RiceGallery, RiceModel
from modeling_rice.comparison_rice import list_candidates
from modeling_rice.scoring_rice import best_first

UNSET = {
    "input_ids": None,
    "attention_mask": None,
    "inputs_embeds": None,
    "labels": None,
    "output_attentions": None,
    "output_hidden_states": False,
}


def tiny_text_config():
    return BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def text_batch():
    return {
        "title_input_ids": torch.tensor([[3, 4, 5], [6, 0, 0], [0, 0, 0]]),
        "title_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
    }


def test_images_and_clips_alone_give_their_embeddings(make_model, make_batch):
    model, batch = make_model(), make_batch()
    clip = {name: value for name, value in batch.items() if name != "pixel_values"}
    images, clips = model(pixel_values=batch["pixel_values"]), model(**clip)
    assert set(images) == {"image_embeds", "pooler_output"} and set(clips) == {"video_embeds", "pooler_output"}
    both = model(**batch)
    for alone, name in ((images, "image_embeds"), (clips, "video_embeds")):
        assert torch.equal(alone[name], both[name]) and torch.equal(alone[0], alone["pooler_output"])
    assert images.loss is None and both.loss is not None
    with pytest.raises(ValueError, match="`frame_mask` and `patch_mask` belong to `pixel_values_videos`"):
        model(pixel_values=batch["pixel_values"], frame_mask=batch["frame_mask"])
    with pytest.raises(ValueError, match="There is nothing to encode"):
        model(product_ids=torch.arange(5))


def test_a_tuple_holds_the_set_outputs_in_order(make_model, make_batch):
    model, batch = make_model(), make_batch()
    whole = model(**batch, return_dict=True)
    values = model(**batch, return_dict=False)
    assert type(values) is tuple and len(values) == len(whole)
    assert all(torch.equal(one, other) for one, other in zip(values, whole.values(), strict=True))
    features = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert torch.equal(features[1], whole.image_embeds)
    assert torch.equal(model.get_video_features(**batch, return_dict=False)[1], whole.video_embeds)
    model.config.return_dict = False
    assert type(model(**batch)) is tuple
    clip = {name: value for name, value in batch.items() if name != "pixel_values"}
    for alone, embeds in (({"pixel_values": batch["pixel_values"]}, whole.image_embeds), (clip, whole.video_embeds)):
        values = model(**alone)
        assert type(values) is tuple and all(torch.equal(value, embeds) for value in values)


def test_unset_arguments_of_other_models_are_accepted(make_model, make_batch):
    model, batch = make_model(), make_batch()
    assert torch.equal(model(**batch, **UNSET).loss, model(**batch).loss)
    model.get_image_features(batch["pixel_values"], **UNSET)
    for name in ("output_attentions", "output_hidden_states"):
        for method in (model, model.get_image_features, model.get_video_features, model.get_text_features):
            with pytest.raises(ValueError, match=f"`{name}` is not supported"):
                method(**batch, **{name: True})
    for wrong in ({"input_ids": torch.ones(5, 2)}, {"labels": torch.ones(5)}, {"colour": None}):
        with pytest.raises(TypeError, match=f"takes no argument '{next(iter(wrong))}'"):
            model(**batch, **wrong)


def test_texts_alone_give_their_embeddings(make_model, text_batch):
    model = make_model(text_config=tiny_text_config(), text_score_weight=0.5)
    titles = model.get_text_features(**text_batch).pooler_output
    torch.testing.assert_close(titles.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(titles, model.encode_text("title", None, *text_batch.values()).embeds)
    plain = {name.removeprefix("title_"): value for name, value in text_batch.items()}
    spoken = {name.replace("title", "asr"): value for name, value in text_batch.items()}
    for other in (plain, spoken):
        assert torch.equal(model.get_text_features(**other).pooler_output, titles)
        output = model(**other)
        assert set(output) == {"text_embeds", "pooler_output"} and torch.equal(output.text_embeds, titles)
    with pytest.raises(ValueError, match="one kind at a time, got title and asr; give one of them"):
        model.get_text_features(**text_batch, **spoken)


def test_texts_of_a_model_without_text_score(make_model, text_batch):
    model = make_model(text_config=tiny_text_config())
    features = model.encode_text("title", None, *text_batch.values()).features
    titles = model.get_text_features(**text_batch).pooler_output
    assert torch.equal(titles, torch.nn.functional.normalize(features, dim=-1)) and not titles[2].any()
    with pytest.raises(ValueError, match="The model has no text encoder"):
        make_model().get_text_features(**text_batch)


@pytest.mark.parametrize("count", [0, -1, 1.5, "a", True])
def test_counts_are_whole_numbers_of_at_least_one(make_model, make_batch, count):
    model, batch = make_model(), make_batch()
    for encode in (model.encode_gallery, model.encode_clips):
        with pytest.raises(ValueError, match="`batch_size` must be (at least 1|an integer), got"):
            encode(**batch, batch_size=count)
    with pytest.raises(ValueError, match="`top_k` must be (at least 1|an integer), got"):
        best_first(torch.zeros(3), count)


def test_arguments_that_are_not_encodings_are_named(make_model, make_batch):
    model, batch = make_model(), make_batch()
    images = {"pixel_values": batch["pixel_values"]}
    gallery, clips = model.encode_gallery(**batch), model.encode_clips(**batch)
    with pytest.raises(ValueError, match="`clips` is a NoneType; give what `encode_clips`"):
        model.similarity(None, gallery)
    with pytest.raises(ValueError, match="`gallery` is a Tensor; give what `encode_gallery`"):
        model.similarity(clips, gallery.embeds)
    model = make_model(alignment_weight=1.0)
    gallery, clips, frames = model.encode_gallery(**batch), model.encode_clips(**batch), model.encode_frames(**images)
    for compare in (model.similarity, model.text_similarity, model.match, model.align):
        with pytest.raises(ValueError, match="`clips` is a RiceGallery; give what `encode_clips` of this model"):
            compare(gallery, clips)
        with pytest.raises(ValueError, match="`clips` is a RiceFrames; give what `encode_clips`"):
            compare(frames, gallery)
        with pytest.raises(ValueError, match="`gallery` is a NoneType; give what `encode_gallery`"):
            compare(clips, None)
    narrow = RiceGallery(gallery.embeds[:, :8])
    with pytest.raises(ValueError, match="embeddings of clips have width 16 and those of images 8; encode both with"):
        model.similarity(clips, narrow)
    with pytest.raises(ValueError, match=r"`pixel_values` must be \(n, 3, H, W\), got shape \(3, 32, 32\)"):
        model.encode_gallery(batch["pixel_values"][0])
    with pytest.raises(ValueError, match="`pixel_values` must be a tensor, got a list"):
        model.encode_gallery([1, 2])


def test_candidates_in_any_sequence(tmp_path):
    paths = ["a.png", "b.png"]
    for several in (paths, tuple(paths), np.array(paths), (path for path in paths)):
        assert list_candidates(several) == paths
    picture = np.zeros((4, 5, 3), np.uint8)
    for one in (picture, picture[..., 0], "a.png", b"bytes", {"path": "a.png"}):
        assert list_candidates(one)[0] is one and len(list_candidates(one)) == 1
    assert len(list_candidates(np.stack([picture] * 3))) == 3
    with pytest.raises(ValueError, match="is a set, which has no order"):
        list_candidates(set(paths))
    with pytest.raises(ValueError, match="is the folder .*; give a list of its images"):
        list_candidates(tmp_path)


def test_arguments_of_wrong_type_or_shape_are_named(make_model, make_batch):
    model, batch = make_model(), make_batch()
    images, clips, mask = (batch[name] for name in ("pixel_values", "pixel_values_videos", "frame_mask"))
    frames = model.encode_frames(images)
    for call, message in (
        (lambda: model(pixel_values=images.numpy()), "`pixel_values` must be a tensor, got a ndarray; give what"),
        (lambda: model(pixel_values_videos=clips.numpy()), "`pixel_values_videos` must be a tensor, got a ndarray"),
        (lambda: model.get_image_features(None), "`pixel_values` must be a tensor, got a NoneType"),
        (lambda: model.encode_pictures(images.tolist()), "`pixel_values` must be a tensor, got a list"),
        (lambda: model(images, clips, mask.numpy()), "`frame_mask` must be a tensor, got a ndarray"),
        (lambda: model.encode_clips(clips, mask.numpy()), "`frame_mask` must be a tensor, got a ndarray"),
        (lambda: model.encode_clips(clips, mask[:2]), "`frame_mask` has 2 rows, but `pixel_values_videos` has 5"),
        (lambda: model.get_video_features(clips, patch_mask=[1]), "`patch_mask` must be a tensor, got a list"),
        (lambda: model.encode_frames(images, torch.ones(1, 16)), r"`patch_mask` must be \(n, P\) with n = 5 images"),
        (lambda: model.encode_pictures(images, torch.ones(2, 16)), r"n = 5 images, got shape \(2, 16\)"),
        (lambda: model.encode_pictures(images, [[True] * 16] * 5), "`patch_mask` must be a tensor, got a list"),
        (
            lambda: model.encode_clips(clips, patch_mask=torch.ones(5, 3, 4, 4)),
            r"must be \(B, T, P\) .*\(5, 3, 4, 4\)",
        ),
        (lambda: model.pool_frames(images), "`frames` is a Tensor; give what `encode_frames` of this"),
        (lambda: model.pool_frames(frames, [[True] * 5]), "`frame_mask` must be a tensor, got a list"),
        (lambda: model(pixel_values=images[:, :1]), r"must be \(n, 3, H, W\), got shape \(5, 1, 32, 32\)"),
        (lambda: model(pixel_values=images[:0]), "There is nothing to encode: the batch is empty"),
        (lambda: model(pixel_values_videos=clips[:0]), r"must be \(B, T, 3, H, W\), .* got shape \(0, 3, 3, 32, 32\)"),
        (lambda: model(**batch, product_ids=[1, 2, 3, 4, 5]), "`product_ids` must be a tensor, got a list"),
        (lambda: model(**batch, product_ids=torch.arange(3)), r"`product_ids` must have one entry per pair, .*\(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: model(pixel_value=images), lambda: model(pixel_values=images, title=["a"])):
        with pytest.raises(TypeError, match="`forward` takes no argument"):
            call()


def test_texts_that_do_not_fit_are_named(make_model, make_batch, text_batch):
    model, batch = make_model(text_config=tiny_text_config(), text_score_weight=0.5), make_batch()
    ids = text_batch["title_input_ids"]
    for call, message in (
        (lambda: model(**batch, title_input_ids=ids), "There are 3 texts .* for 5 images or clips; give one text"),
        (lambda: model(**batch, asr_input_ids=ids), "There are 3 texts .* for 5 images or clips"),
        (lambda: model.encode_gallery(batch["pixel_values"], title_input_ids=ids), "`title_input_ids` has 3 rows"),
        (lambda: model.get_text_features(ids.numpy()), "`input_ids` must be a tensor, got a ndarray"),
        (lambda: model.get_text_features(ids[0]), r"`input_ids` must be \(n, L\) integers, got shape \(3,\)"),
        (lambda: model.get_text_features(ids[:, :0]), r"`input_ids` must be \(n, L\)"),
        (lambda: model.get_text_features(ids.float()), "integers, got shape .* of torch.float32"),
        (lambda: model.get_text_features(ids, ids[:2]), r"`attention_mask` must have the shape of the ids, \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_token_embeddings_grow_with_the_tokenizer(make_model, tmp_path):
    model = make_model(text_config=tiny_text_config())
    old = model.get_text_features(torch.tensor([[3, 4]])).pooler_output
    model.resize_token_embeddings(60)
    assert torch.equal(model.get_text_features(torch.tensor([[3, 4]])).pooler_output, old)
    model.save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path)
    new = torch.tensor([[3, 59]])
    assert torch.equal(loaded.get_text_features(new).pooler_output, model.get_text_features(new).pooler_output)
    with pytest.raises(ValueError, match="no text encoder .* so it has no token embeddings"):
        make_model().resize_token_embeddings(60)
