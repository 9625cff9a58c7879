import pytest
import torch

PATCHES = 16


@pytest.mark.parametrize("include_cls", [False, True])
def test_maps_reconstruct_what_the_loss_compares(make_model, make_batch, include_cls):
    model = make_model(reconstruction_include_cls=include_cls, use_reconstruction=True)
    batch = make_batch(3)
    maps = model.reconstruction_maps(**batch)
    assert maps.shape == (3, PATCHES, 3, PATCHES) and maps.min() >= 0 and not maps.requires_grad
    images, clips = model.image_tokens(**batch), model.clip_tokens(**batch)
    weights = model.reconstruction_weights(images.states, clips.keys, clips.mask, 1 + PATCHES)
    clip, frame, patch, image_patch = 0, 2, 5, 7
    column, row = frame * PATCHES + patch, image_patch
    if include_cls:
        column, row = frame * (1 + PATCHES) + 1 + patch, 1 + image_patch
    assert maps[clip, image_patch, frame, patch] == weights[clip, row, column]


def test_padded_frames_and_masked_patches_have_no_weight(make_model, make_batch):
    model, batch = make_model(), make_batch(3, patch_mask=True)
    maps = model.reconstruction_maps(**batch)
    real = batch["frame_mask"][:, :, None] & batch["patch_mask"]
    shown = maps.amax(dim=1)
    assert (shown[~real] == 0).all() and (shown[real] > 0).any()


def test_maps_of_a_pair_do_not_depend_on_its_batch(make_model, make_batch):
    model, batch = make_model(), make_batch(3)
    together = model.reconstruction_maps(**batch)
    alone = model.reconstruction_maps(**{name: value[1:2] for name, value in batch.items()})
    torch.testing.assert_close(alone[0], together[1])


def test_refuses_models_without_maps(make_model, make_batch):
    batch = make_batch(2)
    with pytest.raises(ValueError, match="no reconstruction head"):
        make_model(use_reconstruction=False).reconstruction_maps(**batch)
    with pytest.raises(ValueError, match="1 images and 2 clips"):
        make_model().reconstruction_maps(batch["pixel_values"][:1], batch["pixel_values_videos"])
    with pytest.raises(TypeError, match="`reconstruction_maps` takes no argument 'frame_maks'"):
        make_model().reconstruction_maps(**batch, frame_maks=batch["frame_mask"])
