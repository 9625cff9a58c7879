"""Training on cached features of a frozen encoder equals training on pictures, with every other part of the model."""

import logging

import pytest
import torch
from datasets import Dataset

from data_rice.features import pair_features
from modeling_rice import RiceModel
from tests.data_rice.conftest import write_video  # noqa: F401
from tests.training_rice.runs import run
from tests.training_rice.texts import TEXT
from training_rice.arguments import RiceTrainingArguments


def boxed(pairs: Dataset) -> Dataset:
    """The pairs with a box in each first frame."""
    return pairs.map(
        lambda row: row | {"boxes": [[0.0, 0.0, 0.5, 0.6], None][: len(row["frames"])]}, features=pair_features()
    )


class TestEqualsTrainingOnPictures:
    @pytest.mark.parametrize(
        "changes, overrides",
        [
            ({}, {}),
            ({"use_decoder": False}, {}),
            ({"use_decoder": False}, {"memory_queue_size": 8}),
            ({"decoder_token_source": "raw", "matching_negatives": "all"}, {}),
            ({}, {"grad_cache_chunk": 2}),
            ({"temporal_pooling": "attention", "learn_logit_scale": True}, {"ema_decay": 0.9}),
        ],
    )
    def test_each_step(self, make_trainer, model_settings, changes, overrides):
        settings = model_settings | changes
        plain = run(make_trainer(settings, cached=False, **overrides))
        cached = run(make_trainer(settings, cached=True, **overrides))
        assert len(plain[0]) == 4
        assert plain[0][0] != plain[0][-1]
        assert cached[0] == pytest.approx(plain[0], abs=1e-5)
        assert cached[1] == plain[1]
        for name, value in plain[2].items():
            torch.testing.assert_close(cached[2][name], value, atol=1e-5, rtol=1e-5, msg=name)

    @pytest.mark.parametrize("changes", [{"use_decoder": False}, {}, {"patch_saliency": "learned"}])
    def test_batch_norms_keep_their_statistics(self, make_trainer, resnet_settings, changes):
        settings = resnet_settings | changes
        plain, cached = (run(make_trainer(settings, cached=cached)) for cached in (False, True))
        assert cached[0] == pytest.approx(plain[0], abs=1e-5)
        moving = [name for name in plain[2] if name.endswith("running_mean")]
        assert moving
        assert all(torch.equal(plain[2][name], cached[2][name]) for name in moving)

    def test_with_inner_patches(self, make_trainer, resnet_settings):
        settings = resnet_settings | {"vision_feature_layer": 1, "patch_saliency": "learned"}
        plain, cached = (run(make_trainer(settings, cached=cached))[0] for cached in (False, True))
        assert cached == pytest.approx(plain, abs=1e-5)

    @pytest.mark.parametrize("kind", ["encoder", "pooling"])
    def test_with_boxes(self, make_trainer, model_settings, resnet_settings, pairs, validation, kind):
        settings = model_settings if kind == "encoder" else resnet_settings | {"patch_mask_pooling": True}
        views = boxed(pairs), validation
        data = {"use_boxes": True, "num_frames": 3}
        plain, cached = (run(make_trainer(settings, cached=c, data=data, views=views))[0] for c in (False, True))
        unboxed = run(make_trainer(settings, cached=True, views=(pairs, validation)))[0]
        assert cached == pytest.approx(plain, abs=1e-5)
        assert cached != pytest.approx(unboxed, abs=1e-5)

    def test_with_text(self, make_trainer, model_settings, text_pairs, text_validation):
        settings = model_settings | {"text_config": dict(TEXT), "text_score_weight": 0.5}
        data = {"use_text": True, "asr_noise": 0.5}
        views = text_pairs, text_validation
        plain, cached = (run(make_trainer(settings, cached=c, data=data, views=views)) for c in (False, True))
        assert cached[0] == pytest.approx(plain[0], abs=1e-5)
        assert cached[1] == plain[1]

    def test_with_videos(self, make_trainer, pairs, validation, write_video, tmp_path):  # noqa: F811
        path = write_video(tmp_path / "clip.mp4", num_frames=8, fps=4, size=(32, 32))
        rows = pairs.map(
            lambda row, i: row | {"frames": [], "boxes": [], "video": str(path), "start": i / 8, "end": 2.0},
            with_indices=True,
            features=pairs.features,
        )
        data = {"train_num_frames": 2, "frame_sampling": "train"}
        plain, cached = (run(make_trainer(cached=c, data=data, views=(rows, validation)))[0] for c in (False, True))
        assert cached == pytest.approx(plain, abs=1e-5)

    def test_half_precision_is_near(self, make_trainer):
        plain = run(make_trainer(cached=False))[0]
        cached = run(make_trainer(cached=True, cached_precision="fp16"))[0]
        assert cached == pytest.approx(plain, rel=2e-2)


class TestPass:
    @pytest.fixture
    def encoded(self, monkeypatch):
        """How many pictures have gone through an encoder."""
        counts, original = [], RiceModel.encode_pictures

        def encode_pictures(self, pixel_values, patch_mask=None):
            counts.append(len(pixel_values))
            return original(self, pixel_values, patch_mask)

        monkeypatch.setattr(RiceModel, "encode_pictures", encode_pictures)
        return counts

    def test_happens_once(self, make_trainer, encoded, caplog):
        with caplog.at_level(logging.INFO):
            make_trainer(cached=True)
        # 20 frames and 12 images to train on, 12 and 6 to validate on, and one to learn the size.
        assert sum(encoded) == 51
        # 16 patches and the global feature, of 32 numbers each.
        assert f"Up to 50 pictures go through the encoder once; their encodings, {50 * 17 * 32 * 4:,} bytes" in (
            caplog.text
        )
        encoded.clear()
        run(make_trainer(cached=True))
        assert encoded == []

    def test_keeps_only_what_is_used(self, make_trainer, model_settings):
        trainer = make_trainer(model_settings | {"use_decoder": False}, cached=True)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["pixel_values"].shape == (6, 32)
        assert batch["pixel_values_videos"].shape == (6, 1, 32)

    def test_another_encoder_has_another_cache_and_says_so(self, make_trainer, make_model, encoded, caplog):
        make_trainer(cached=True)
        model = make_model()
        with torch.no_grad():
            model.vision_model.get_parameter("pre_layrnorm.weight")[3] += 1e-3
        encoded.clear()
        with caplog.at_level(logging.INFO):
            make_trainer(cached=True, model=model)
        assert sum(encoded) == 51
        assert "was made with another encoder: the pictures of this run's clips are encoded again" in caplog.text

    def test_continues_after_an_interruption(self, make_trainer, encoded, monkeypatch, tmp_path):
        monkeypatch.setattr("training_rice.feature_cache.ROWS_PER_BLOCK", 8)
        make_trainer(cached=True)
        first, *_ = sorted(tmp_path.glob("cache/rice_features/clips-*/view-0-block-000001.pt"))
        first.unlink()
        encoded.clear()
        make_trainer(cached=True)
        # The last four clips have seven frames, and one picture tells the size.
        assert sum(encoded) == 8

    def test_a_small_disk_is_refused_before_encoding(self, make_trainer, encoded, monkeypatch):
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("training_rice.feature_cache_encoding.shutil.disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match="needs 108,800 bytes, and .*rice_features has 1,000 free; make room"):
            make_trainer(cached=True)
        assert sum(encoded) == 1

    def test_numbers_that_half_precision_cannot_hold(self, make_trainer, make_model):
        model = make_model()
        with torch.no_grad():
            model.vision_model.post_layernorm.weight *= 1e6
            for parameter in model.vision_model.encoder.layers[-1].mlp.fc2.parameters():
                parameter.fill_(1e5)
        with pytest.raises(ValueError, match="cached_precision fp16 cannot hold the encoder's outputs"):
            make_trainer(cached=True, cached_precision="fp16", model=model)

    def test_unreadable_pictures(self, make_trainer, pairs, validation, tmp_path):
        torn = {"path": None, "bytes": b"torn"}

        def damage(row, number):
            if number == 0:
                row["image"] = torn
            if number == 1:
                row["frames"] = [torn, row["frames"][1]]
            if number == 2:
                row["frames"] = [torn] * len(row["frames"])
            return row

        rows = pairs.map(damage, with_indices=True, features=pairs.features)
        trainer = make_trainer(cached=True, views=(rows, validation))
        batch = trainer.data_collator(trainer.train_dataset.to_list())
        assert batch["pixel_values"].shape[0] == 12
        # Pairs 0 and 2 are replaced by others of the batch.
        assert len(set(batch["product_ids"].tolist())) == 10
        listed = (tmp_path / "failures.jsonl").read_text()
        assert [listed.count(f'"clip{i}"') for i in range(4)] == [1, 1, 2, 0]


class TestViews:
    data = {"augment_crop": 0.5, "augment_flip": 0.5}

    def test_are_drawn_at_each_step_and_equal_in_each_run(self, make_trainer):
        batches = []
        for _ in range(2):
            trainer = make_trainer(cached=True, data=self.data, cached_views=3)
            rows = trainer.train_dataset.select([0] * 12).to_list()
            torch.manual_seed(0)
            batches.append(trainer.data_collator(rows))
        assert torch.equal(batches[0]["pixel_values_videos"], batches[1]["pixel_values_videos"])
        assert len(batches[0]["pixel_values"].unique(dim=0)) == 3
        assert len(batches[0]["pixel_values_videos"].unique(dim=0)) == 3

    def test_follow_the_seed(self, make_trainer):
        images = []
        for seed in (0, 1):
            trainer = make_trainer(cached=True, data=self.data, cached_views=2, seed=seed)
            images.append(trainer.data_collator.images.read(1, 0).states)
        assert not torch.equal(*images)

    def test_validation_sees_pictures_as_they_are(self, make_trainer):
        plain, changed = (
            make_trainer(cached=True, data=data, cached_views=views).eval_collator.clips.folder
            for data, views in ((None, 1), (self.data, 2))
        )
        assert plain == changed


class TestRefusals:
    @pytest.mark.parametrize(
        "data, overrides, message",
        [
            ({"streaming": True}, {}, "cache_vision_features: streaming reads rows on demand"),
            ({"frame_sampling": "visible"}, {}, "frame_sampling visible needs boxes"),
            ({"use_boxes": True, "frames_without_box": "drop"}, {}, "frames_without_box drop depends on"),
            ({"augment_jitter": 0.2}, {}, "need several views of each: set cached_views"),
            ({}, {"cached_views": 4}, "cached_views 4 would give equal views"),
        ],
    )
    def test_name_settings_that_exclude_each_other(self, make_trainer, data, overrides, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(cached=True, data=data, **overrides)

    def test_padded_frames_that_count(self, make_trainer, model_settings):
        with pytest.raises(ValueError, match="mask_padded_frames false encodes padded frames"):
            make_trainer(model_settings | {"mask_padded_frames": False}, cached=True, data={"use_boxes": True})

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"cache_vision_features": True}, "needs an encoder that stays as it is; set freeze_vision too"),
            ({"cached_views": 2}, "cached_views goes with cache_vision_features"),
            ({"cached_frames": 2}, "cached_frames goes with cache_vision_features"),
            ({"cached_precision": "fp32"}, "cached_precision goes with cache_vision_features"),
            ({"cached_frames": 0}, "cached_frames must be at least 1"),
        ],
    )
    def test_arguments(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            RiceTrainingArguments(**overrides)
