"""Training an encoder's last stage: on cached states of the stages before it every step equals a step on pictures."""

import pytest
import torch

from modeling_rice import RiceModel
from tests.training_rice.conftest import CLIP_VISION
from tests.training_rice.runs import run
from training_rice.arguments import RiceTrainingArguments

STAGE = {"unfreeze_last_stage": True}


@pytest.fixture
def settings_of(model_settings, resnet_settings):
    """Settings of a model on one of several encoders."""
    deep = {"vision_config": {**CLIP_VISION, "num_hidden_layers": 3}}
    vit = {name: value for name, value in CLIP_VISION.items() if name != "model_type"} | {"num_hidden_layers": 2}
    return {
        "clip": model_settings | deep,
        "clip, an early layer": model_settings | deep | {"vision_feature_layer": 1, "use_reconstruction": False},
        "clip, the entering layer": model_settings | deep | {"vision_feature_layer": -2},
        "vit": model_settings | {"vision_config": {"model_type": "vit", **vit}},
        "resnet": resnet_settings,
        "resnet, aligned": resnet_settings
        | {"use_decoder": False, "alignment_weight": 1.0, "vision_feature_layer": 1},
        "resnet, saliency": resnet_settings | {"patch_saliency": "learned", "vision_feature_layer": 1},
        "resnet, no decoder": resnet_settings | {"use_decoder": False},
    }


NAMES = ("clip", "clip, an early layer", "clip, the entering layer", "vit", "resnet", "resnet, aligned")
NAMES += ("resnet, saliency", "resnet, no decoder")


def embeddings(model, trainer) -> torch.Tensor:
    """Of the validation clips, from a trainer's pictures or cached states."""
    inputs, _, _ = trainer.eval_collator.collate_queries(trainer.eval_views[0].to_list())
    return model.eval().encode_clips(**inputs).embeds


@pytest.mark.parametrize("name", NAMES)
def test_each_step_equals_one_on_pictures(make_trainer, settings_of, name):
    start = make_trainer(settings_of[name], cached=False).model.state_dict()
    start = {key: value.clone() for key, value in start.items()}
    # Adam takes gradients that are zero up to rounding at full length.
    plain_sgd = {"optim": "sgd", **STAGE}
    trainers = [make_trainer(settings_of[name], cached=cached, **plain_sgd) for cached in (False, True)]
    plain, cached = map(run, trainers)
    assert len(plain[0]) == 4
    assert cached[0] == pytest.approx(plain[0], abs=1e-5)
    for key, value in plain[2].items():
        torch.testing.assert_close(cached[2][key], value, atol=1e-5, rtol=1e-4, msg=key)
    on_pictures, on_states = (embeddings(trainers[1].model, trainer) for trainer in trainers)
    torch.testing.assert_close(on_states, on_pictures)
    changed = {key for key, value in start.items() if not torch.equal(cached[2][key], value)}
    trained = {key for key in changed if key.startswith("vision_model.")}
    last = "vision_model.encoder.stages.1." if "resnet" in name else "vision_model."
    assert trained and all(key.startswith(last) for key in trained)
    before = () if "resnet" in name else ("embeddings", "layers.0.")
    assert not any(part in key for key in trained for part in (*before, "running_"))


@pytest.mark.parametrize("overrides", [{"grad_cache_chunk": 2}, {"ema_decay": 0.9}, {"memory_queue_size": 8}])
def test_with_other_ways_to_train(make_trainer, settings_of, overrides):
    settings = settings_of["resnet, no decoder" if "memory_queue_size" in overrides else "resnet"]
    plain, cached = (run(make_trainer(settings, cached=cached, **STAGE, **overrides)) for cached in (False, True))
    assert cached[0] == pytest.approx(plain[0], abs=1e-5)


def test_the_checkpoint_is_an_ordinary_one(make_trainer, settings_of, tmp_path):
    trainer = make_trainer(settings_of["resnet"], cached=True, **STAGE)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "model")
    loaded = RiceModel.from_pretrained(tmp_path / "model")
    pictures = torch.rand(3, 3, 32, 32)
    trainer.model.eval()
    assert torch.equal(loaded.encode_gallery(pictures).embeds, trainer.model.encode_gallery(pictures).embeds)
    assert loaded.last_stage is None and loaded.fingerprint() == trainer.model.fingerprint()


def test_only_dropout_of_the_last_stage_is_active(make_trainer, model_settings):
    vision = {**CLIP_VISION, "num_hidden_layers": 2, "attention_dropout": 0.5}
    trainer = make_trainer(model_settings | {"vision_config": vision}, cached=False, **STAGE)
    trainer.model.train()
    trainer._keep_frozen()
    layers = trainer.model.vision_model.encoder.layers
    assert not layers[0].self_attn.training and layers[1].self_attn.training


def test_parts_of_it_may_stay_frozen(make_trainer, settings_of):
    trainer = make_trainer(settings_of["clip"], cached=False, **STAGE, freeze=["vision_model.encoder.layers.2.mlp"])
    trainer.model.train()
    trainer._keep_frozen()
    layer = trainer.model.vision_model.encoder.layers[2]
    assert layer.self_attn.q_proj.weight.requires_grad and layer.training
    assert not layer.mlp.fc1.weight.requires_grad and not layer.mlp.training


class TestCache:
    def folder(self, trainer):
        return trainer.data_collator.clips.folder

    def test_is_shared_by_runs_with_the_same_frozen_stages(self, make_trainer, make_model, settings_of):
        folder = self.folder(make_trainer(settings_of["resnet"], cached=True, **STAGE))
        assert self.folder(make_trainer(settings_of["resnet, aligned"], cached=True, **STAGE)) == folder
        model = make_model(settings_of["resnet"])
        with torch.no_grad():
            model.vision_model.encoder.stages[1].layers[0].layer[0].convolution.weight.add_(1.0)
        assert self.folder(make_trainer(cached=True, model=model, **STAGE)) == folder
        model = make_model(settings_of["resnet"])
        with torch.no_grad():
            model.vision_model.encoder.stages[0].layers[0].layer[0].normalization.running_mean.add_(1.0)
        assert self.folder(make_trainer(cached=True, model=model, **STAGE)) != folder

    def test_is_not_that_of_the_whole_encoder(self, make_trainer, settings_of):
        stage, whole = (make_trainer(settings_of["resnet"], cached=True, **extra) for extra in (STAGE, {}))
        assert self.folder(stage) != self.folder(whole)


class TestRefusals:
    def test_without_frozen_stages(self):
        with pytest.raises(ValueError, match="unfreeze_last_stage goes with freeze_vision"):
            RiceTrainingArguments(unfreeze_last_stage=True)

    def test_all_of_it_frozen(self, make_trainer, settings_of):
        with pytest.raises(ValueError, match="freeze names all that unfreeze_last_stage trains"):
            make_trainer(settings_of["clip"], cached=False, **STAGE, freeze=["vision_model"])

    def test_activations_that_are_recomputed(self, make_trainer, settings_of):
        with pytest.raises(ValueError, match="activation_checkpointing recomputes a stage"):
            make_trainer(settings_of["clip"], cached=True, gradient_checkpointing=True, **STAGE)

    def test_boxes_inside_the_encoder(self, make_trainer, settings_of):
        with pytest.raises(ValueError, match="both need model.patch_mask_pooling true"):
            make_trainer(settings_of["clip"], cached=True, data={"use_boxes": True}, **STAGE)
