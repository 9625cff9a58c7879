"""RiceGallery and RiceClips: rows, storage, files."""

import pytest
import torch
from safetensors.torch import save_file

from modeling_rice import RiceClips, RiceGallery


def gallery(rows=5, width=4):
    return RiceGallery(
        embeds=torch.randn(rows, width),
        states=torch.randn(rows, 6),
        text_embeds=torch.randn(rows, 3),
        patches=torch.randn(rows, 9, 2).half(),
    )


def clips(rows=3, tokens=7):
    return RiceClips(
        embeds=torch.randn(rows, 4),
        keys=torch.randn(rows, tokens, 6),
        values=torch.randn(rows, tokens, 6),
        mask=torch.rand(rows, tokens) < 0.5,
        text_embeds=torch.randn(rows, 3),
        patches=torch.randn(rows, tokens - 2, 9, 2).half(),
        patch_mask=torch.rand(rows, tokens - 2, 9) < 0.5,
    )


def fields(features):
    return {name: getattr(features, name) for name in features.fields}


@pytest.mark.parametrize("make", [gallery, clips])
@pytest.mark.parametrize("index", [slice(1, 3), slice(None, None, 2), [2, 0], torch.tensor([1, 1, 0])])
def test_rows_are_taken_from_every_field(make, index):
    features = make()
    part = features[index]
    assert type(part) is type(features)
    for name, tensor in fields(features).items():
        assert torch.equal(getattr(part, name), tensor[index])


def test_a_single_row_keeps_its_dimension():
    features = gallery(3)
    for index in (0, 2, -1, -3):
        assert len(features[index]) == 1
        assert torch.equal(features[index].embeds[0], features.embeds[index])
    for index in (3, -4):
        with pytest.raises(IndexError, match="outside the 3 rows"):
            features[index]
    assert [len(row) for row in features] == [1, 1, 1]


def test_concatenation_restores_the_parts():
    features = clips(5)
    joined = RiceClips.cat([features[:2], features[2:3], features[3:]])
    for name, tensor in fields(features).items():
        assert torch.equal(getattr(joined, name), tensor)


def test_clips_of_unequal_length_are_padded_and_masked():
    short, long = clips(2, tokens=3), clips(1, tokens=5)
    joined = RiceClips.cat([short, long])
    assert joined.keys.shape == (3, 5, 6) and joined.mask.shape == (3, 5)
    assert torch.equal(joined.keys[:2, :3], short.keys) and torch.equal(joined.keys[2:], long.keys)
    assert joined.patches.shape == (3, 3, 9, 2) and not joined.patch_mask[:2, 1:].any()
    assert not joined.mask[:2, 3:].any() and torch.equal(joined.mask[:2, :3], short.mask)


def test_padding_does_not_change_matching(make_model, make_batch):
    model, batch = make_model(), make_batch(4)
    shop = model.encode_gallery(batch["pixel_values"])
    one = model.encode_clips(batch["pixel_values_videos"][:1, :1])
    three = model.encode_clips(batch["pixel_values_videos"][1:])
    together = model.match(RiceClips.cat([one, three]), shop)
    torch.testing.assert_close(together[:1], model.match(one, shop), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:], model.match(three, shop), rtol=1e-4, atol=1e-5)


def test_encodings_that_do_not_fit_together_are_not_joined():
    with pytest.raises(ValueError, match="at least one part"):
        RiceGallery.cat([])
    with pytest.raises(ValueError, match="hold different fields"):
        RiceGallery.cat([gallery(), RiceGallery(embeds=torch.randn(1, 4))])
    with pytest.raises((ValueError, RuntimeError), match="(?i)size"):
        RiceGallery.cat([gallery(width=4), gallery(width=3)])


def test_without_decoder_features_hold_embeddings_only(tmp_path):
    features = RiceGallery(embeds=torch.randn(3, 4))
    assert features.states is None and features[:2].states is None and len(features[:2]) == 2
    features.save(tmp_path / "shop.safetensors")
    assert RiceGallery.load(tmp_path / "shop.safetensors").states is None


def test_half_precision_converts_numbers_but_not_the_mask():
    features = clips()
    half = features.to(torch.float16)
    assert half.keys.dtype == half.embeds.dtype == torch.float16 and half.mask.dtype == torch.bool
    # Patches are stored in half precision, and stay as they are.
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(features.to(dtype).patches, features.patches)
    assert torch.equal(half.mask, features.mask)
    back = half.to("cpu", torch.float32)
    torch.testing.assert_close(back.keys, features.keys, rtol=1e-3, atol=1e-3)
    assert features.keys.dtype == torch.float32


def test_half_precision_storage_still_matches(make_model, make_batch):
    model, batch = make_model(), make_batch(4)
    shop = model.encode_gallery(batch["pixel_values"])
    shown = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    exact = model.match(shown, shop)
    stored = model.match(shown.to(torch.float16), shop.to(torch.float16))
    assert stored.dtype == torch.float32
    assert 0 < (stored - exact).abs().max() < 0.02 * exact.abs().max()
    assert model.similarity(shown.to(torch.float16), shop).dtype == torch.float32


@pytest.mark.parametrize("make", [gallery, clips])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_round_trip_bit_for_bit(tmp_path, make, dtype):
    features = make().to(dtype)[:2]
    features.save(tmp_path / "features.safetensors")
    loaded = type(features).load(tmp_path / "features.safetensors")
    for name, tensor in fields(features).items():
        assert torch.equal(getattr(loaded, name), tensor) and getattr(loaded, name).dtype == tensor.dtype


def test_a_transposed_view_can_be_saved(tmp_path):
    features = RiceGallery(embeds=torch.randn(4, 3).T, states=torch.randn(3, 8)[:, ::2])
    features.save(tmp_path / "features.safetensors")
    assert torch.equal(RiceGallery.load(tmp_path / "features.safetensors").embeds, features.embeds)


def test_files_that_are_not_features_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature file .*nowhere"):
        RiceGallery.load(tmp_path / "nowhere")
    clips().save(tmp_path / "clips")
    with pytest.raises(ValueError, match="holds RiceClips, not RiceGallery"):
        RiceGallery.load(tmp_path / "clips")
    save_file({"embeds": torch.zeros(1, 2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign holds no RICE features"):
        RiceGallery.load(tmp_path / "foreign")
    for content in (b"", b"not a tensor file at all", (tmp_path / "clips").read_bytes()[:-10]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="broken cannot be read"):
            RiceGallery.load(tmp_path / "broken")


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="embed"):
        RiceGallery(embed=torch.zeros(1, 2))


def test_repr_shows_the_shapes():
    assert repr(gallery(2)) == "RiceGallery(embeds=(2, 4), states=(2, 6), text_embeds=(2, 3), patches=(2, 9, 2))"


@pytest.mark.parametrize("make", [gallery, clips])
def test_the_fingerprint_is_kept_by_rows_devices_and_files(make, tmp_path):
    features = make()
    features.model_fingerprint = "ab12"
    path = tmp_path / "features.safetensors"
    features.save(path)
    loaded = type(features).load(path)
    joined = type(features).cat([loaded[:1], loaded[1:].to(torch.float16).to(torch.float32)])
    for each in (features[1], features.to(torch.float16), loaded, joined):
        assert each.model_fingerprint == "ab12"
    make().save(path)
    assert type(features).load(path).model_fingerprint is None


def test_features_of_different_models_are_not_mixed():
    first, second, unknown = gallery(), gallery(), gallery()
    first.model_fingerprint, second.model_fingerprint = "ab12", "cd34"
    with pytest.raises(ValueError, match="different models \\(ab12, cd34\\); encode them with one"):
        RiceGallery.cat([first, unknown, second])
    assert RiceGallery.cat([first, unknown]).model_fingerprint is None
