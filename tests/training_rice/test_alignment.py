"""A trained model's alignment: statistics of the training frames, and nothing else changes."""

import pytest
import torch

from data_rice.decoding import normalize_pixels
from tests.training_rice.runs import run
from training_rice.alignment import fit_alignment

ALIGNED = {"use_decoder": False, "alignment_weight": 1.0, "alignment_shrinkage": 0.0, "normalize_frames": False}


@pytest.fixture
def settings(resnet_settings):
    return resnet_settings | {"vision_feature_layer": 1}


def training_patches(trainer) -> torch.Tensor:
    """Patches of the chosen layer of all frames that a run has trained on."""
    rows = trainer.train_dataset.to_list()
    inputs, _, _ = trainer.data_collator.collate_queries(rows)
    inputs = normalize_pixels(inputs, trainer.processing_class)
    trainer.model.eval()
    with torch.no_grad():
        output = trainer.model.vision_model(
            inputs["pixel_values_videos"][inputs["frame_mask"]], output_hidden_states=True
        )
    return output.hidden_states[1].flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("validated", [True, False])
def test_statistics_are_those_of_the_training_frames(make_trainer, settings, validated):
    trainer = make_trainer(settings | ALIGNED, cached=False, data={"train_num_frames": 2}, freeze_vision=validated)
    trainer.train()
    _ = trainer.evaluate() if validated else trainer.fit_alignment()
    patches, alignment = training_patches(trainer), trainer.model.alignment
    torch.testing.assert_close(alignment.patch_mean, patches.mean(dim=0))
    whitened = (patches - patches.mean(dim=0)) @ alignment.patch_projection
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(8), atol=1e-3, rtol=0)
    assert not alignment.image_mean.any() and not alignment.video_mean.any()


def test_averaged_weights_keep_the_statistics_that_validation_fitted(make_trainer, settings):
    """Else a run ended by the trainer, or a checkpoint, would align by the statistics of a new model."""
    data = {"train_num_frames": 2}
    options = {"freeze_vision": False, "ema_decay": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(settings | ALIGNED, cached=False, data=data, **options)
    trainer.train()
    patches = training_patches(trainer)
    torch.testing.assert_close(trainer.model.alignment.patch_mean, patches.mean(dim=0))


def test_the_rest_of_the_model_is_trained_as_without_one(make_trainer, settings):
    plain = run(make_trainer(settings | ALIGNED | {"alignment_weight": None}, cached=False))
    trainer = make_trainer(settings | ALIGNED, cached=False)
    aligned = run(trainer)
    assert aligned[0] == plain[0]
    assert all(torch.equal(aligned[2][name], value) for name, value in plain[2].items())
    assert (
        aligned[1].items() >= {f"eval_embedding_{k}": plain[1][f"eval_embedding_{k}"] for k in ("R@1", "R@5")}.items()
    )
    assert {"eval_alignment_R@1", "eval_fused_R@1"} <= aligned[1].keys()
    assert trainer.model.config.ranking == "fused"


def test_cached_features_give_the_same(make_trainer, settings):
    plain, cached = (run(make_trainer(settings | ALIGNED, cached=cached)) for cached in (False, True))
    assert cached[1] == plain[1]
    torch.testing.assert_close(cached[2]["alignment.patch_mean"], plain[2]["alignment.patch_mean"])


def test_averaged_weights_do_not_average_statistics(make_trainer, settings):
    own, averaged = (
        run(make_trainer(settings | ALIGNED, cached=False, **extra))[2] for extra in ({}, {"ema_decay": 0.5})
    )
    for name in ("alignment.patch_mean", "alignment.patch_projection"):
        torch.testing.assert_close(averaged[name], own[name])


def test_unreadable_frames_are_refused(make_trainer, settings, pairs):
    torn = pairs.map(lambda row: row | {"frames": [{"path": None, "bytes": b"torn"}]}, features=pairs.features)
    trainer = make_trainer(settings | ALIGNED, cached=False)
    with pytest.raises(ValueError, match="There is no picture to take statistics from"):
        fit_alignment(trainer.model, torn, trainer.data_collator, trainer._loading())
