"""What users of transformers expect of any model: the checks of its own common model tests, written for RICE."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from modeling_rice import RiceConfig, RiceModel

VARIANTS = {
    "default": {},
    "clip4clip": {"preset": "clip4clip"},
    "mmf": {"preset": "mmf"},
    "embedding only": {"use_decoder": False, "use_reconstruction": False},
    "mean over heads": {"reconstruction_mixing": "mean", "matching_negatives": "all"},
    "sigmoid": {"contrastive_loss": "sigmoid", "learn_logit_scale": True, "logit_scale_init_value": 10.0},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def outputs(model, batch, **kwargs):
    with torch.no_grad():
        return {name: tensor for name, tensor in model(**batch, **kwargs).items() if isinstance(tensor, torch.Tensor)}


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_config_round_trips(make_config, variant, tmp_path):
    config = make_config(**variant)
    config.save_pretrained(tmp_path)

    def settings(each):
        return {n: value for n, value in each.to_dict().items() if n not in ("_name_or_path", "transformers_version")}

    for each in (RiceConfig.from_dict(config.to_dict()), AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert type(each) is RiceConfig and settings(each) == settings(config)


def test_saving_and_loading_keep_every_output(make_model, make_batch, variant, tmp_path):
    model, batch = make_model(**variant), make_batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert_equal(outputs(loaded, batch), outputs(model, batch), rtol=0, atol=0)


def test_a_new_model_depends_on_the_seed_only(make_config, variant):
    def build(seed):
        torch.manual_seed(seed)
        return RiceModel(make_config(**variant)).state_dict()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert not torch.equal(first["visual_projection.weight"], other["visual_projection.weight"])


def test_parts_missing_from_a_checkpoint_start_as_new_ones(make_model, make_config, tmp_path):
    """Loading builds the model without memory first, so that what no file fills must be filled by its own rules."""
    encoder = make_model(use_decoder=False, use_reconstruction=False)
    encoder.save_pretrained(tmp_path)
    config = make_config(learn_logit_scale=True)
    model, info = RiceModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"decoder", "reconstruction_head"}
    assert torch.equal(model.visual_projection.weight, encoder.visual_projection.weight)
    head = model.reconstruction_head
    weight = head.conv1.weight.detach()
    assert weight.mean() == pytest.approx(1 / head.conv1.in_channels)
    assert (weight > 0).all() and weight.std(dim=0).min() > 1e-2
    assert not head.conv1.bias.any()
    for name, parameter in model.decoder.named_parameters():
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 100:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.3), name


def test_eval_mode_is_deterministic(make_model, make_batch, variant):
    model, batch = make_model(**variant), make_batch()
    assert_equal(outputs(model, batch), outputs(model, batch), rtol=0, atol=0)


def test_one_at_a_time_equals_a_batch(make_model, make_batch, variant):
    model, batch = make_model(**variant), make_batch(patch_mask=True)
    gallery = model.encode_gallery(batch["pixel_values"])
    clip_keys = ("pixel_values_videos", "frame_mask", "patch_mask")
    clips = model.encode_clips(**{name: batch[name] for name in clip_keys})
    scores = model.match(clips, gallery) if model.decoder is not None else model.similarity(clips, gallery)
    for i in range(5):
        one_image = model.encode_gallery(batch["pixel_values"][i : i + 1])
        one_clip = model.encode_clips(**{name: batch[name][i : i + 1] for name in clip_keys})
        torch.testing.assert_close(one_image.embeds[0], gallery.embeds[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one_clip.embeds[0], clips.embeds[i], rtol=1e-4, atol=1e-5)
        compare = model.match if model.decoder is not None else model.similarity
        torch.testing.assert_close(compare(one_clip, one_image)[0, 0], scores[i, i], rtol=1e-4, atol=1e-5)


def test_every_parameter_that_trains_gets_a_gradient(make_model, make_batch, variant):
    model = make_model(**variant).train()
    model(**make_batch()).loss.backward()
    assert not {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_change_no_gradient(make_model, make_batch, variant, use_reentrant):
    model, batch = make_model(**variant, decoder_dropout=0.0).train(), make_batch()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    model(**batch).loss.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_every_way_of_loading(make_model, make_batch, variant, dtype, tmp_path):
    model, batch = make_model(**variant), make_batch()
    model.save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path, dtype=dtype)
    cast = copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).bfloat16()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    expected = outputs(model, batch, return_loss=False)
    for each in (loaded, cast):
        actual = outputs(each, batch, return_loss=False)
        assert all(tensor.isfinite().all() for tensor in actual.values())
        cosine = (actual["video_embeds"].float() * expected["video_embeds"]).sum(dim=1)
        assert (cosine > 0.99).all()
    assert_equal(outputs(loaded, batch), outputs(cast, batch))


def test_attention_back_ends_agree(make_model, make_batch, variant):
    """Forward and backward, with clips of uneven length and patch masks."""
    batch, results = make_batch(patch_mask=True), []
    for implementation in ("eager", "sdpa"):
        model = make_model(**variant, decoder_dropout=0.0)
        model.set_attn_implementation(implementation)
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}
        output = model(**batch)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs(model, batch), gradients))
    assert_equal(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    largest = max(gradient.abs().max() for gradient in results[0][1].values())
    for name, gradient in results[0][1].items():
        assert (gradient - results[1][1][name]).abs().max() < 1e-4 * largest, name


def test_the_attention_back_end_can_be_chosen_when_loading(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for choice, expected in (("eager", ["eager"] * 2), ({"vision_config": "eager"}, ["sdpa", "eager"])):
        model = RiceModel.from_pretrained(tmp_path, attn_implementation=choice)
        configs = (model.decoder.cross_layer.attention.config, model.vision_model.config)
        assert [config._attn_implementation for config in configs] == expected
    with pytest.raises((ValueError, ImportError), match="Flash"):
        RiceModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
def test_the_towers_compile_without_graph_breaks(make_model, make_batch, preset):
    """On frames that are packed already; which frames those are depends on the data."""
    torch.compiler.reset()
    model, batch = make_model(preset), make_batch(patch_mask=True)
    frames, patches = batch["pixel_values_videos"][batch["frame_mask"]], batch["patch_mask"][batch["frame_mask"]]
    encode = compiled(model.encode_frames)
    with torch.no_grad():
        encoded, expected = encode(frames, patches), model.encode_frames(frames, patches)
        for name in expected.fields:
            torch.testing.assert_close(getattr(encoded, name), getattr(expected, name))
        images = batch["pixel_values"]
        features = compiled(model.get_image_features)(images)
        torch.testing.assert_close(features.pooler_output, model.get_image_features(images).pooler_output)
        tokens = features.last_hidden_state
        states = compiled(model.decoder.encode_images)(tokens)
        clips = tokens.flatten(0, 1)[None].expand(2, -1, -1)
        mask = torch.ones(clips.shape[:2], dtype=torch.bool)
        keys, values, mask = compiled(model.decoder.encode_clips)(clips, mask)
        scores = compiled(model.decoder.score_pairs)(states[:, 0], keys, values, mask)
        torch.testing.assert_close(scores, model.decoder.score_pairs(states[:, 0], keys, values, mask))


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {
            "vision_model": "cpu",
            "visual_projection": "cpu",
            "logit_scale": "cpu",
            "decoder": "disk",
            "reconstruction_head": "cpu",
        },
        {
            "vision_model": "disk",
            "visual_projection": "disk",
            "logit_scale": "cpu",
            "decoder": "disk",
            "reconstruction_head": "cpu",
        },
    ],
    ids=["cpu", "auto", "decoder on disk", "encoder on disk"],
)
@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
def test_weights_may_be_spread_over_devices(make_model, make_batch, preset, device_map, tmp_path):
    model, batch = make_model(preset), make_batch()
    model.save_pretrained(tmp_path / "model")
    loaded = RiceModel.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    clips = loaded.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    assert loaded.device == clips.embeds.device == torch.device("cpu")
    scores = loaded.match(clips, loaded.encode_gallery(batch["pixel_values"]))
    theirs = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    torch.testing.assert_close(scores, model.match(theirs, model.encode_gallery(batch["pixel_values"])))
