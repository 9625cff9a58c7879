"""A model that starts from a pretrained encoder: which weights are used, and what is reported about the rest."""

import logging

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetModel,
)

from training_rice.arguments import ModelArguments
from training_rice.pretrained import start_from
from training_rice.setup import build_model

TEXT_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_TOWER |= {"vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


class TestEncoder:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("whole", [False, True])
    def test_clip(self, clip_vision_config, model_settings, tmp_path, whole, dtype):
        clip = CLIPVisionModel(clip_vision_config)
        if whole:
            vision = clip_vision_config.to_dict() | {"dtype": None}
            clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT_TOWER))
        clip.to(dtype).save_pretrained(tmp_path / "clip")
        settings = {name: value for name, value in model_settings.items() if name != "vision_config"}
        model = build_model(ModelArguments(init_vision_from=str(tmp_path / "clip"), model=settings))
        assert model.config.vision_config.hidden_size == 32
        source = dict(getattr(clip, "vision_model", clip).named_parameters())
        copied = dict(model.vision_model.named_parameters())
        assert copied.keys() == source.keys()
        for name, value in copied.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, source[name].float())
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        model(torch.zeros(4, 3, 32, 32), torch.zeros(4, 1, 3, 32, 32)).loss.backward()

    def test_batch_norms_are_copied(self, resnet_settings, tmp_path):
        vision = {name: value for name, value in resnet_settings["vision_config"].items() if name != "model_type"}
        encoder = ResNetModel(ResNetConfig(**vision))
        encoder(torch.randn(2, 3, 32, 32))
        encoder.save_pretrained(tmp_path / "resnet")
        model = build_model(ModelArguments(init_vision_from=str(tmp_path / "resnet"), model=resnet_settings))
        for name, value in encoder.state_dict().items():
            assert torch.equal(model.vision_model.state_dict()[name], value), name

    def test_missing_folder(self, tmp_path, model_settings):
        with pytest.raises(FileNotFoundError, match="nothing"):
            build_model(ModelArguments(init_vision_from=str(tmp_path / "nothing"), model=model_settings))


BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")


def assert_same_block(block, layer, output_projection: bool = True) -> None:
    for name in BLOCK:
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(block.get_submodule(name), kind), getattr(layer.get_submodule(name), kind))
    for name in ("q_proj", "k_proj", "v_proj", "out_proj")[: 4 if output_projection else 3]:
        ours, theirs = block.attention.get_submodule(name), layer.self_attn.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)


class TestOtherParts:
    @pytest.fixture
    def clip(self, tmp_path):
        """Encoder of width 32 with three layers; text tower and projection of width 16."""
        torch.manual_seed(2)
        vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 32, "patch_size": 8}
        text = TEXT_TOWER | {"hidden_size": 16, "intermediate_size": 64, "max_position_embeddings": 20}
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
        for value in model.parameters():
            torch.nn.init.normal_(value)
        model.save_pretrained(tmp_path / "clip")
        return model

    @pytest.fixture
    def build(self, clip, tmp_path, caplog):
        """A function that starts from it, and gives the model and what was logged."""

        def build(**settings):
            settings = {"projection_dim": 16, "decoder_num_heads": 4, **settings}
            with caplog.at_level(logging.INFO):
                return build_model(
                    ModelArguments(init_vision_from=str(tmp_path / "clip"), model=settings)
                ), caplog.text

        return build

    def test_projection(self, build, clip):
        model, text = build(use_decoder=False)
        assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
        assert "clip: encoder, projection." in text
        images = torch.randn(2, 3, 32, 32)
        theirs = clip.eval().get_image_features(images).pooler_output
        torch.testing.assert_close(
            model.eval().get_image_features(images).pooler_output, torch.nn.functional.normalize(theirs, dim=-1)
        )

    def test_projection_of_another_width_starts_at_random(self, build):
        model, text = build(projection_dim=8, use_decoder=False)
        assert "clip: encoder. Random: projection." in text
        assert model.visual_projection.weight.std() < 0.1

    def test_projection_of_an_encoder_alone(self, clip_vision_config, tmp_path):
        encoder = CLIPVisionModelWithProjection(clip_vision_config)
        encoder.save_pretrained(tmp_path / "alone")
        width = clip_vision_config.projection_dim
        settings = {"projection_dim": width, "decoder_num_heads": 4}
        model = build_model(ModelArguments(init_vision_from=str(tmp_path / "alone"), model=settings))
        assert torch.equal(model.visual_projection.weight, encoder.visual_projection.weight)

    @pytest.mark.parametrize("self_layers", [1, 2])
    def test_decoder_on_raw_tokens_takes_the_last_blocks(self, build, clip, self_layers):
        model, text = build(
            decoder_token_source="raw", decoder_output_projection=True, decoder_num_self_layers=self_layers
        )
        layers = clip.vision_model.encoder.layers
        for block, layer in zip(model.decoder.self_layers, layers[2 - self_layers : 2], strict=True):
            assert_same_block(block, layer)
        assert_same_block(model.decoder.cross_layer, layers[2])
        assert f"decoder (last {self_layers + 1} blocks of the encoder)" in text

    def test_decoder_on_projected_tokens_takes_text_blocks(self, build, clip):
        model, text = build()
        assert_same_block(model.decoder.self_layers[0], clip.text_model.encoder.layers[0])
        positions = model.decoder.position_embedding.weight
        assert torch.equal(positions, clip.text_model.embeddings.position_embedding.weight[: len(positions)])
        assert model.decoder.cross_layer.mlp.fc1.weight.std() < 0.1
        assert "decoder (first 1 block(s) of the text tower)" in text
        model(torch.zeros(4, 3, 32, 32), torch.zeros(4, 1, 3, 32, 32)).loss.backward()

    def test_decoder_of_another_width_starts_at_random(self, build):
        model, text = build(projection_dim=32)
        assert "Random: projection, decoder." in text
        assert model.decoder.self_layers[0].mlp.fc1.weight.std() < 0.1

    def test_decoder_with_more_blocks_than_the_encoder(self, build):
        assert (
            "Random: projection, decoder."
            in build(decoder_token_source="raw", decoder_num_self_layers=3, projection_dim=8)[1]
        )

    def test_another_vision_config_is_reported(self, build):
        model, text = build(vision_config={"model_type": "resnet"}, use_decoder=False)
        assert "(clip_vision_model) replaces the recipe's vision_config (resnet), which differs in model_type." in text
        assert model.config.vision_config.hidden_size == 32

    def test_same_vision_config_is_not_reported(self, build):
        assert "replaces" not in build(vision_config={"hidden_size": 32, "patch_size": 8})[1]


WHOLE = ["siglip", "siglip2", "altclip", "chinese_clip", "blip", "metaclip_2", "aimv2"]
BACKBONES = {
    "vitdet": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64},
    "rt_detr_resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


@pytest.mark.parametrize("name", [*WHOLE, *BACKBONES])
def test_any_encoder_may_be_named(name, tmp_path):
    """Models with a vision part, and backbones, which AutoModel does not know."""
    if name in BACKBONES:
        source = AutoBackbone.from_config(AutoConfig.for_model(name, **BACKBONES[name]))
    else:
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**tower, "patch_size": 16} | ({"num_patches": 16} if name == "siglip2" else {"image_size": 64})
        text = {**tower, "vocab_size": 100}
        source = AutoModel.from_config(AutoConfig.for_model(name, vision_config=vision, text_config=text))
    source.save_pretrained(tmp_path)
    model = start_from(str(tmp_path), {"use_decoder": False, "projection_dim": 16})
    weights = getattr(source, "vision_model", source).state_dict()
    own = model.vision_model.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(own[key], weights[key]) for key in weights)
