"""What changes a model's name and what does not, and that features of another model are refused."""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, ResNetConfig, ViTConfig

from modeling_rice import RiceClips, RiceConfig, RiceGallery, RiceModel
from modeling_rice.fingerprint_rice import changes_in_training, fingerprint, same_state

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = {"image_size": 32, "patch_size": 8}


def encode(model, batch):
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    return clips, model.encode_gallery(batch["pixel_values"])


def test_a_copy_has_the_same_fingerprint(make_model, tmp_path):
    model = make_model()
    name = model.fingerprint()
    assert len(name) == 32 and int(name, 16) >= 0
    model.save_pretrained(tmp_path)
    assert RiceModel.from_pretrained(tmp_path).fingerprint() == name
    assert RiceModel.from_pretrained(tmp_path, attn_implementation="eager").fingerprint() == name
    assert copy.deepcopy(model).fingerprint() == name
    assert model.train().fingerprint() == model.eval().fingerprint() == name
    assert copy.deepcopy(model).double().fingerprint() == copy.deepcopy(model).to("cpu").fingerprint() == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_copy_accepts_encodings_of_the_model(make_model, make_batch, tmp_path, dtype):
    model, batch = make_model(), make_batch()
    _, gallery = encode(model, batch)
    model.save_pretrained(tmp_path)
    for half in (copy.deepcopy(model).to(dtype), RiceModel.from_pretrained(tmp_path, dtype=dtype)):
        assert same_state(half.fingerprint(), model.fingerprint())
        clips, own = encode(half, batch)
        for shop in (gallery, own, RiceGallery.cat([gallery, own]).to(dtype)):
            assert half.similarity(clips, shop).shape == half.match(clips, shop).shape == (5, len(shop))
        with torch.no_grad():
            half.decoder.cross_layer.mlp.fc1.weight[0, 0] += 0.5
        assert not same_state(half.fingerprint(), model.fingerprint())
        with pytest.raises(ValueError, match="`gallery` was encoded by another model"):
            half.match(encode(half, batch)[0], gallery)


def test_states_are_compared_by_either_half_of_the_fingerprint():
    one, halves = "0123456789abcdef" * 2, ("0123456789abcdef", "fedcba9876543210")
    assert same_state(one, one) and same_state(None, one) and same_state(one, None)
    assert same_state(one, halves[0] + halves[1]) and same_state(one, halves[1] + halves[0])
    assert not same_state(one, halves[1] + halves[1]) and not same_state(f"{one}-int8", one)
    # The halves stand for different roundings.
    assert not same_state(halves[0] + halves[1], halves[1] + halves[0])


class Adapted(torch.nn.Module):
    """A linear layer with low-rank adapters, with the attributes and the forward pass of PEFT's."""

    def __init__(self, base: torch.nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer, self.rank = base, rank
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.scaling, self.active_adapters, self.merged_adapters, self.disable_adapters = {}, [], [], False

    def add(self, name: str, scaling: float = 2.0):
        self.lora_A[name] = torch.nn.Linear(self.base_layer.in_features, self.rank, bias=False)
        self.lora_B[name] = torch.nn.Linear(self.rank, self.base_layer.out_features, bias=False)
        self.scaling[name], self.active_adapters = scaling, [name]
        return self.eval()

    def change(self, name: str) -> torch.Tensor:
        return self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight

    def merge(self):
        with torch.no_grad():
            for name in self.active_adapters:
                self.base_layer.weight += self.change(name)
        self.merged_adapters = list(self.active_adapters)

    def forward(self, x):
        result = self.base_layer(x)
        for name in [] if self.disable_adapters else set(self.active_adapters) - set(self.merged_adapters):
            result = result + x @ self.change(name).T
        return result


def adapted(model, name="first"):
    """The model with an adapter on its projection, and that layer."""
    model.visual_projection = layer = Adapted(model.visual_projection)
    # What asks for the layer's weight finds it, as with PEFT.
    Adapted.weight = property(lambda self: self.base_layer.weight)
    layer.add(name)
    return model, layer


def test_adapters_that_are_active_switched_off_and_merged_are_different_states(make_model, make_batch):
    plain, batch = make_model(), make_batch()
    name, (clips, gallery) = plain.fingerprint(), encode(plain, batch)
    model, layer = adapted(copy.deepcopy(plain))
    active, (active_clips, active_gallery) = model.fingerprint(), encode(model, batch)
    assert not same_state(active, name) and (active_gallery.embeds - gallery.embeds).abs().max() > 1e-3
    layer.disable_adapters = True
    off_clips, off_gallery = encode(model, batch)
    assert model.fingerprint() == name and torch.equal(off_gallery.embeds, gallery.embeds)
    model.match(clips, off_gallery)
    with pytest.raises(ValueError, match="`gallery` was encoded by .*adapters were switched"):
        model.match(off_clips, active_gallery)
    layer.disable_adapters = False
    assert model.fingerprint() == active
    with pytest.raises(ValueError, match="`clips` was encoded by .*adapters were switched"):
        model.match(clips, active_gallery)
    layer.merge()
    merged = model.fingerprint()
    torch.testing.assert_close(encode(model, batch)[1].embeds, active_gallery.embeds)
    assert not same_state(merged, active) and not same_state(merged, name)
    # Merged for good it is a plain model with these weights.
    model.visual_projection = layer.base_layer
    assert model.fingerprint() == merged
    assert active_clips.model_fingerprint == active


def test_only_active_adapters_count(make_model):
    model, layer = adapted(make_model())
    first = model.fingerprint()
    layer.add("second")
    second = model.fingerprint()
    layer.active_adapters = ["first"]
    assert model.fingerprint() == first
    with torch.no_grad():
        layer.lora_A["second"].weight.mul_(2)
    assert model.fingerprint() == first
    layer.active_adapters = ["second"]
    assert model.fingerprint() not in (first, second)
    layer.active_adapters = ["first", "second"]
    both = model.fingerprint()
    layer.scaling["first"] = 3.0
    assert len({first, second, both, model.fingerprint()}) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"matching_scale": 7.0, "logit_scale_init_value": 3.0},
        {"matching_negatives": "all", "num_hard_negatives": 1},
        {"use_reconstruction": False, "fusion_weight": 0.5, "fused_text_weight": 3.0},
    ],
)
def test_training_settings_do_not_change_the_fingerprint(make_model, settings):
    model = make_model()
    other = make_model(**settings)
    other.load_state_dict(model.state_dict(), strict=False)
    assert other.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    "settings", [{"normalize_frames": False}, {"decoder_hidden_act": "relu"}, {"decoder_normalize_key_value": False}]
)
def test_encoding_settings_change_the_fingerprint(make_model, settings):
    model, other = make_model(), make_model(**settings)
    other.load_state_dict(model.state_dict(), strict=False)
    assert other.fingerprint() != model.fingerprint()


@pytest.mark.parametrize("fused", [False, True])
def test_every_training_step_changes_the_fingerprint(make_model, make_batch, fused):
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


def test_loading_other_weights_changes_the_fingerprint(make_model):
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
        with pytest.raises(ValueError, match="`gallery` was encoded by another model.* encode it again"):
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


def test_offloaded_weights_have_no_fingerprint(make_model, make_batch):
    model, batch = make_model(), make_batch()
    clips, gallery = encode(model, batch)
    offloaded = make_model()
    offloaded.vision_model.to("meta")
    assert offloaded.fingerprint() is None
    assert offloaded.similarity(clips, gallery).shape == (5, 5)


RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", hidden_act="relu", num_channels=3
)
NORMS = {"vision_config": RESNET, "vision_pooling": "mean", "decoder_position_embeddings": False}
DROPOUT = {"vision_config": ViTConfig(**TINY, **PICTURES, hidden_dropout_prob=0.1)}
ATTENTION = {"vision_config": CLIPVisionConfig(**TINY, **PICTURES, attention_dropout=0.1)}
TEXT = {"text_config": {"vocab_size": 50, **TINY, "max_position_embeddings": 16}}


@pytest.mark.parametrize("settings", [NORMS, DROPOUT, ATTENTION, TEXT, {"decoder_dropout": 0.1}])
def test_training_mode_is_refused_where_it_changes_encodings(make_model, make_batch, settings):
    model, batch = make_model(**{"decoder_dropout": 0.0, **settings}), make_batch(2)
    clips, gallery = encode(model, batch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # As a whole, and in one part alone.
    for part in (model, next(m for m in model.modules() if changes_in_training(m.train()) or not m.eval())):
        part.train()
        for call in (
            lambda: encode(model, batch),
            lambda: model.encode_gallery(batch["pixel_values"]),
            lambda: model.match(clips, gallery),
            lambda: model.rank(None, gallery, processor=lambda **_: {"pixel_values_videos": clips}),
            lambda: model.attention_maps(**batch),
            lambda: model.reconstruction_maps(**batch),
        ):
            with pytest.raises(ValueError, match=r"needs the model in eval mode.* call `model.eval\(\)` first"):
                call()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        model.eval()
    torch.testing.assert_close(encode(model, batch)[1].embeds, gallery.embeds)


def test_pictures_are_stored_only_of_an_encoder_in_eval_mode(make_model, make_batch):
    model, pixels = make_model(**NORMS), make_batch(2)["pixel_values"]
    expected = model.encode_pictures(pixels)
    # The rest of the model takes no part.
    model.train().vision_model.eval()
    assert torch.equal(model.encode_pictures(pixels), expected)
    model.vision_model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`encode_pictures` needs the model in eval mode"):
        model.encode_pictures(pixels)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_training_mode_is_allowed_where_it_changes_nothing(make_model, make_batch):
    model, batch = make_model(decoder_dropout=0.0), make_batch(2)
    expected = encode(model, batch)
    for actual, other in zip(encode(model.train(), batch), expected, strict=True):
        assert torch.equal(actual.embeds, other.embeds)


def test_tuples_saved_as_lists_have_the_same_fingerprint(tmp_path):
    vision = {"model_type": "vitdet", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RiceModel(RiceConfig(vision_config=vision, use_decoder=False)).eval()
    model.save_pretrained(tmp_path)
    assert RiceModel.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_a_settled_model_keeps_its_fingerprint_in_any_precision(make_model, make_batch):
    model, batch = make_model(), make_batch()
    name = model.fingerprint()
    in_halves = [copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert not same_state(*(half.fingerprint() for half in in_halves))
    settled = [copy.deepcopy(model).settle().to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert [half.fingerprint() for half in settled] == [name, name]
    clips, gallery = encode(settled[0], batch)
    assert settled[1].similarity(clips, gallery).isfinite().all()
    assert copy.deepcopy(model).settle("-int8").fingerprint() == f"{name}-int8"
    # Training ends it.
    assert settled[0].train().eval().fingerprint() == in_halves[0].fingerprint()
