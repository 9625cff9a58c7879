"""Groups with rates that fall layer by layer, what is frozen, and averaged weights."""

import pytest
import torch
from torch import nn

from training_rice.averaging import AveragedWeights, load_averaged
from training_rice.optimizer import freeze, layer_factors, parameter_groups


class TestLayerDecay:
    def test_clip(self, make_model, model_settings):
        settings = model_settings | {"vision_config": model_settings["vision_config"] | {"num_hidden_layers": 3}}
        model = make_model(settings)
        factors = layer_factors(model, 0.5)
        assert factors.keys() == dict(model.named_parameters()).keys()
        for name, factor in factors.items():
            expected = 1.0
            if ".layers." in name and name.startswith("vision_model."):
                expected = {"0": 0.125, "1": 0.25, "2": 0.5}[name.split(".layers.")[1][0]]
            elif name.startswith(("vision_model.embeddings.", "vision_model.pre_layrnorm.")):
                expected = 0.0625
            assert factor == expected, name
        assert factors["vision_model.post_layernorm.weight"] == 1.0

    def test_stages(self, make_model, resnet_settings):
        factors = layer_factors(make_model(resnet_settings), 0.5)
        assert factors["vision_model.embedder.embedder.convolution.weight"] == 0.125
        assert factors["vision_model.encoder.stages.0.layers.0.layer.0.convolution.weight"] == 0.25
        assert factors["vision_model.encoder.stages.1.layers.0.layer.0.convolution.weight"] == 0.5

    def test_encoder_without_numbers(self):
        model = nn.Module()
        model.vision_model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="layer_decay: the layers of Linear are not numbered"):
            layer_factors(model, 0.5)

    def test_groups(self, make_model):
        model = make_model()
        freeze(model, ["decoder"])
        factors = layer_factors(model, 0.5)
        groups = parameter_groups(
            model, 1.0, 0.1, 0.2, lambda name: "vision_model." in name, lambda name: "bias" not in name, factors.get
        )
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert len(rates) == len(trained)
        assert rates[id(trained["vision_model.encoder.layers.0.mlp.fc1.weight"])] == pytest.approx(0.05)
        assert rates[id(trained["vision_model.embeddings.class_embedding"])] == pytest.approx(0.025)
        assert rates[id(trained["visual_projection.weight"])] == 1.0


class TestFreeze:
    def test_modules_and_weights(self, make_model):
        model = make_model()
        modules = freeze(model, ["vision_model.embeddings", "visual_projection.weight"])
        assert modules == [model.vision_model.embeddings]
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        assert frozen == {
            "visual_projection.weight",
            *(f"vision_model.embeddings.{name}" for name, _ in model.vision_model.embeddings.named_parameters()),
        }

    def test_unknown_name(self, make_model):
        with pytest.raises(
            ValueError, match="the model has no 'vision_model.embedings'; did you mean 'vision_model.emb"
        ):
            freeze(make_model(), ["vision_model.embedings"])


class TestAverage:
    def test_by_hand(self):
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        average = AveragedWeights(model, 0.3)
        expected = 1.0
        for value, decay in ((2.0, 2 / 11), (4.0, 3 / 12), (8.0, 0.3)):
            with torch.no_grad():
                model.weight.fill_(value)
            average.update(model)
            expected = decay * expected + (1 - decay) * value
            assert average.average["weight"].item() == pytest.approx(expected, rel=1e-6)
        with average.applied(model):
            assert model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == 8.0

    def test_own_weights_are_restored_after_an_error(self, make_model):
        model = make_model()
        average = AveragedWeights(model, 0.9)
        with torch.no_grad():
            model.visual_projection.weight.add_(1)
        before = model.visual_projection.weight.clone()
        with pytest.raises(RuntimeError), average.applied(model):
            raise RuntimeError
        assert torch.equal(model.visual_projection.weight, before)

    def test_round_trip(self, make_model, resnet_settings, tmp_path):
        model = make_model(resnet_settings)
        freeze(model, ["visual_projection"])
        average = AveragedWeights(model, 0.9)
        assert "visual_projection.weight" not in average.average
        assert any("running_mean" in name for name in average.average)
        assert not any("num_batches" in name for name in average.average)
        for value in model.parameters():
            nn.init.normal_(value)
        average.update(model)
        average.save(tmp_path)
        other = AveragedWeights(model, 0.9)
        other.load(tmp_path, 1)
        assert other.updates == 1
        for name, value in average.average.items():
            assert torch.equal(other.average[name], value)
        assert load_averaged(model, tmp_path)
        assert torch.equal(model.state_dict()["logit_scale"], model.logit_scale)
        for name, value in average.average.items():
            assert torch.equal(model.state_dict()[name], value)
        assert not load_averaged(model, tmp_path / "nothing")

    def test_of_another_model(self, make_model, tmp_path):
        AveragedWeights(make_model(), 0.9).save(tmp_path)
        with pytest.raises(ValueError, match="averaged.safetensors is of another model"):
            AveragedWeights(make_model(use_decoder=False), 0.9).load(tmp_path, 1)
