"""Which patches make a frame's feature: masks without attention, and a learnt saliency."""

import pytest
import torch

from modeling_rice import RiceConfig, RiceModel
from modeling_rice.patches_rice import RicePatchSaliency, resize_patch_mask

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"image_size": 32, "patch_size": 8, "model_type": "vit"}


def build(vision=RESNET, **settings):
    settings = {"vision_pooling": "mean", "projection_dim": 16, "decoder_num_heads": 2, **settings}
    settings |= {"decoder_position_embeddings": False}
    torch.manual_seed(0)
    return RiceModel(RiceConfig(vision_config=dict(vision), **settings)).eval()


@pytest.fixture
def clips():
    """Two clips of three frames, of which the last is padding; 32 x 32 pixels are 4 x 4 patches of either encoder."""
    frame_mask = torch.tensor([[True, True, True], [True, True, False]])
    patch_mask = torch.zeros(2, 3, 16, dtype=torch.bool)
    patch_mask[..., [5, 6, 9, 10]] = True
    return {
        "pixel_values_videos": torch.randn(2, 3, 3, 32, 32),
        "frame_mask": frame_mask,
        "patch_mask": patch_mask,
    }


class TestResizing:
    def test_a_mask_of_the_grid_is_unchanged(self):
        mask = torch.rand(2, 3, 16) > 0.5
        assert torch.equal(resize_patch_mask(mask, 16), mask.float())

    def test_a_coarser_patch_keeps_the_share_of_its_area(self):
        mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).flatten().bool()
        assert torch.equal(resize_patch_mask(mask[None], 4), torch.tensor([[0.75, 0, 0, 0.5]]))

    def test_a_finer_patch_repeats(self):
        mask = torch.tensor([[True, False, False, True]])
        expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).flatten().float()
        assert torch.equal(resize_patch_mask(mask, 16)[0], expected)

    def test_other_grids_are_refused(self):
        with pytest.raises(ValueError, match="8 patches per frame and the encoder 16, which are not both square"):
            resize_patch_mask(torch.ones(1, 8), 16)


class TestMaskPooling:
    def test_equals_the_plain_computation(self, clips):
        model = build(patch_mask_pooling=True)
        encoded = model.encode_clips(**clips)
        for row, length in ((0, 3), (1, 2)):
            frames = []
            for pixels in clips["pixel_values_videos"][row, :length]:
                states = model.vision_model(pixels[None]).last_hidden_state[0].flatten(1).T
                feature = model.visual_projection(states[[5, 6, 9, 10]].mean(dim=0))
                frames.append(torch.nn.functional.normalize(feature, dim=0))
            expected = torch.nn.functional.normalize(torch.stack(frames).mean(dim=0), dim=0)
            torch.testing.assert_close(encoded.embeds[row], expected)

    @pytest.mark.parametrize("mask_size", [16, 4, 64])
    def test_the_decoder_sees_kept_patches_only(self, clips, mask_size):
        model = build(patch_mask_pooling=True)
        clips["patch_mask"] = resize_patch_mask(clips["patch_mask"], mask_size) > 0
        mask = model.encode_clips(**clips).mask.unflatten(1, (3, 17))
        kept = resize_patch_mask(clips["patch_mask"], 16) > 0
        assert torch.equal(mask[0, :, 1:], kept[0]) and mask[0, :, 0].all()
        assert not mask[1, 2].any()

    def test_a_full_mask_changes_nothing(self, clips):
        model = build(patch_mask_pooling=True)
        gallery = model.encode_gallery(torch.randn(2, 3, 32, 32))
        full = clips | {"patch_mask": torch.ones_like(clips["patch_mask"])}
        masked, plain = model.encode_clips(**full), model.encode_clips(**clips | {"patch_mask": None})
        torch.testing.assert_close(masked.embeds, plain.embeds)
        torch.testing.assert_close(model.match(masked, gallery), model.match(plain, gallery))

    def test_hidden_patches_do_not_matter_beyond_the_receptive_field(self, clips):
        """A patch embedding without attention has no receptive field outside: what is masked has no influence."""
        model = build(VIT | {"num_hidden_layers": 1}, patch_mask_pooling=True)
        model.vision_model.layers = torch.nn.ModuleList()
        changed = clips["pixel_values_videos"].clone()
        changed[..., :8, :] = 5.0
        before, after = (model.encode_clips(**clips | {"pixel_values_videos": p}) for p in (
            clips["pixel_values_videos"], changed))  # fmt: skip
        torch.testing.assert_close(before.embeds, after.embeds)

    def test_trains(self, clips):
        model = build(patch_mask_pooling=True, matching_negatives="all").train()
        output = model(pixel_values=torch.randn(2, 3, 32, 32), **clips)
        output.loss.backward()
        assert output.loss.isfinite() and output.reconstruction_loss > 0
        assert all(p.grad.isfinite().all() for p in model.vision_model.parameters() if p.grad is not None)

    def test_without_it_a_mask_is_refused(self, clips):
        with pytest.raises(ValueError, match="the layers of 'resnet' take no attention mask.*patch_mask_pooling"):
            build().encode_clips(**clips)

    def test_needs_the_mean(self):
        with pytest.raises(ValueError, match="`patch_mask_pooling=True` changes the mean over patches; set `vision_"):
            build(VIT, vision_pooling="cls", patch_mask_pooling=True)


def test_side_of_a_mask_patch():
    def size(**vision):
        return RiceConfig(vision_config=vision, vision_pooling="mean").mask_patch_size

    assert size(**RESNET) == 8 and size(**RESNET | {"downsample_in_first_stage": True}) == 16
    assert size(model_type="swin") == 32 and size(**VIT) == 8
    model = build(RESNET | {"downsample_in_first_stage": True})
    assert model.get_image_features(torch.randn(1, 3, 32, 32)).last_hidden_state.shape[1] == 1 + (32 // 16) ** 2


class TestSaliency:
    def test_starts_as_the_plain_mean(self, clips):
        plain, salient = build(patch_mask_pooling=True), build(patch_mask_pooling=True, patch_saliency="learned")
        missing, unexpected = salient.load_state_dict(plain.state_dict(), strict=False)
        assert {name.split(".")[0] for name in missing} == {"patch_saliency"} and not unexpected
        for batch in (clips, clips | {"patch_mask": None}):
            torch.testing.assert_close(salient.encode_clips(**batch).embeds, plain.encode_clips(**batch).embeds)

    def test_weighs_the_patches_of_clips_and_not_of_images(self, clips):
        model = build(patch_saliency="learned")
        clips["patch_mask"] = None
        images = torch.randn(2, 3, 32, 32)
        before = model.encode_clips(**clips).embeds, model.encode_gallery(images).embeds
        torch.nn.init.normal_(model.patch_saliency.score.weight, std=3.0)
        after = model.encode_clips(**clips).embeds, model.encode_gallery(images).embeds
        assert not torch.allclose(before[0], after[0], atol=1e-3)
        torch.testing.assert_close(before[1], after[1])

    def test_is_confined_to_the_mask(self):
        head = RicePatchSaliency(RiceConfig(vision_config=RESNET, vision_pooling="mean"))
        torch.nn.init.normal_(head.score.weight)
        weights = head(torch.randn(2, 5, 16))
        assert weights.shape == (2, 5) and (weights > 0).all() and (weights < 1).all()

    def test_learns_where_the_signal_is(self):
        """A corner of each frame has the colour of the clip's product, the rest another one every time."""
        model = build(patch_saliency="learned", use_decoder=False, logit_scale_init_value=10.0).train()
        generator = torch.Generator().manual_seed(0)
        colours = 1.5 * torch.randn(8, 3, generator=generator)
        images = colours[:, :, None, None].expand(-1, -1, 32, 32)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(50):
            videos = 1.5 * torch.randn(8, 1, 3, 1, 1, generator=generator).repeat(1, 1, 1, 32, 32)
            videos[..., :16, :16] = colours[:, None, :, None, None]
            loss = model(pixel_values=images, pixel_values_videos=videos).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states = model.vision_model(videos[:, 0]).last_hidden_state.flatten(2).transpose(1, 2)
        saliency = model.patch_saliency(states).mean(dim=0).reshape(4, 4)
        assert saliency[:2, :2].mean() > 1.5 * saliency[2:, 2:].mean()

    def test_round_trip(self, clips, tmp_path):
        model = build(patch_saliency="learned")
        torch.nn.init.normal_(model.patch_saliency.score.weight)
        model.save_pretrained(tmp_path)
        again = RiceModel.from_pretrained(tmp_path).eval()
        clips["patch_mask"] = None
        torch.testing.assert_close(again.encode_clips(**clips).embeds, model.encode_clips(**clips).embeds)

    def test_needs_the_mean(self):
        with pytest.raises(ValueError, match="`patch_saliency='learned'` changes the mean over patches"):
            build(VIT, vision_pooling="pooler", patch_saliency="learned")
