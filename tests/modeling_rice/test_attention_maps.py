import pytest
import torch

PATCHES = 16


def plain_attention(model, batch, image, clip):
    """Cross-attention of one pair, head by head, from the layers' weights: `(heads, 1 + P, tokens of the clip)`."""
    clips = model.clip_tokens(**batch)
    layer = model.decoder.cross_layer
    tokens = clips.tokens[clip].flatten(0, 1)
    query = layer.attention.q_proj(layer.layer_norm1(model.image_tokens(**batch).states[image]))
    key = layer.attention.k_proj(layer.layer_norm1(tokens) if model.config.decoder_normalize_key_value else tokens)
    width = query.shape[-1] // model.config.decoder_num_heads
    maps = []
    for head in range(model.config.decoder_num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = (query[:, part] @ key[:, part].T) / width**0.5
        maps.append(scores.masked_fill(~clips.mask[clip], -torch.inf).softmax(dim=-1))
    return torch.stack(maps)


@pytest.mark.parametrize("patch_mask", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_maps_are_the_mean_over_heads_of_a_plain_computation(make_model, make_batch, patch_mask, normalize):
    model = make_model(decoder_normalize_key_value=normalize)
    batch = make_batch(3, patch_mask=patch_mask)
    maps = model.attention_maps(**batch)
    assert maps.shape == (3, 1 + PATCHES, 3, PATCHES) and not maps.requires_grad
    for pair in range(3):
        plain = plain_attention(model, batch, pair, pair).mean(dim=0).unflatten(-1, (3, 1 + PATCHES))
        torch.testing.assert_close(maps[pair], plain[..., 1:].detach())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_matching_score_attends_as_the_class_token_of_the_maps(make_model, make_batch, implementation):
    model, batch = make_model(), make_batch(3)
    model.set_attn_implementation(implementation)
    states, clips = model.image_tokens(**batch).states, model.clip_tokens(**batch)
    maps = model.attention_maps(**batch)
    frame, patch = 0, 11
    # With values that are 1 at one token and 0 elsewhere, a context is each head's attention to that token.
    probe = torch.zeros_like(clips.values)
    probe[:, frame * (1 + PATCHES) + 1 + patch] = 1
    contexts = model.decoder.pair_contexts(states[:, 0], clips.keys, probe, clips.mask)
    torch.testing.assert_close(contexts.diagonal().mean(dim=0), maps[:, 0, frame, patch])


def test_padded_frames_and_masked_patches_get_no_attention(make_model, make_batch):
    model, batch = make_model(), make_batch(3, patch_mask=True)
    maps = model.attention_maps(**batch)
    real = (batch["frame_mask"][:, :, None] & batch["patch_mask"])[:, None].expand_as(maps)
    assert (maps[~real] == 0).all() and (maps[real] > 0).all() and (maps.sum(dim=(2, 3)) < 1).all()


def test_text_tokens_get_attention_but_are_not_in_the_maps(make_model, make_batch):
    model, batch = make_model(text_embed_dim=6), make_batch(3, text_dim=6)
    spoken = model.attention_maps(**batch)
    silent = model.attention_maps(**{**batch, "asr_embeds": torch.zeros_like(batch["asr_embeds"])})
    assert spoken.shape == silent.shape == (3, 1 + PATCHES, 3, PATCHES)
    assert (spoken.sum(dim=(2, 3)) < silent.sum(dim=(2, 3))).all()


def test_refuses_models_without_maps(make_model, make_batch):
    batch = make_batch(2)
    with pytest.raises(ValueError, match="no matching decoder, so it has no attention maps"):
        make_model(use_decoder=False, use_reconstruction=False).attention_maps(**batch)
    with pytest.raises(ValueError, match="1 images and 2 clips"):
        make_model().attention_maps(batch["pixel_values"][:1], batch["pixel_values_videos"])
    with pytest.raises(TypeError, match="`attention_maps` takes no argument 'frame_maks'"):
        make_model().attention_maps(**batch, frame_maks=batch["frame_mask"])
