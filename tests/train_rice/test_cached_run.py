"""The training command on cached features: from a pretrained encoder to a model that needs no cache."""

import pytest

import train_rice
from modeling_rice import RiceModel
from tests.train_rice.runs import assert_same_weights, history, interrupt, results
from training_rice.pretrained import load_encoder

CACHED = ["--freeze_vision", "true", "--cache_vision_features", "true", "--model.decoder_dropout", "0.1"]


@pytest.fixture(scope="module")
def encoder(finished, tmp_path_factory):
    """The folder of an encoder: that of a trained model."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    RiceModel.from_pretrained(finished).vision_model.save_pretrained(folder)
    return folder


@pytest.fixture
def words(encoder):
    return ["--init_vision_from", str(encoder), *CACHED]


def test_saves_the_encoder_and_the_trained_parts(command, words, encoder, tmp_path):
    train_rice.main(command(tmp_path / "run", *words))
    model = RiceModel.from_pretrained(tmp_path / "run")
    for name, value in load_encoder(str(encoder)).state_dict().items():
        assert (model.vision_model.state_dict()[name] == value).all(), name
    assert results(tmp_path / "run")["eval_fused_R@5"] > 0


@pytest.mark.parametrize("changes", [[], ["--unfreeze_last_stage", "true"]])
def test_continues_to_the_same_weights_after_an_interruption(command, words, changes, monkeypatch, tmp_path):
    words = [*words, *changes]
    train_rice.main(command(tmp_path / "whole", *words))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_rice.main(command(tmp_path / "broken", *words))
    train_rice.main(command(tmp_path / "broken", *words))
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_workers_read_the_cache(command, words, tmp_path):
    train_rice.main(command(tmp_path / "none", *words))
    train_rice.main(command(tmp_path / "two", *words, "--dataloader_num_workers", "2"))
    assert_same_weights(tmp_path / "none", tmp_path / "two")


def test_only_the_last_stage_of_the_encoder_is_trained(command, words, encoder, tmp_path):
    train_rice.main(command(tmp_path / "run", *words, "--unfreeze_last_stage", "true"))
    trained = RiceModel.from_pretrained(tmp_path / "run").vision_model.state_dict()
    for name, value in load_encoder(str(encoder)).state_dict().items():
        assert (trained[name] == value).all() == ("layers.0." not in name and "post_layernorm" not in name), name


def test_a_frozen_encoder_must_be_a_trained_one(refusal):
    assert "name a pretrained one with --init_vision_from, as `rice encoder" in refusal(*CACHED)


def test_an_encoder_that_is_trained_is_refused(refusal, encoder):
    message = refusal("--init_vision_from", str(encoder), "--cache_vision_features", "true")
    assert "cache_vision_features needs an encoder that stays as it is; set freeze_vision too" in message


@pytest.mark.slow
def test_two_processes_encode_a_share_each(launch, command, words, tmp_path):
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    alone = [*words, "--model.decoder_dropout", "0", "--cached_precision", "fp32"]
    cache = ["--cache_dir", str(tmp_path / "cache")]
    text = launch(
        options, tmp_path / "two", *alone, *cache, "--per_device_train_batch_size", "4", ACCELERATE_USE_CPU="true"
    )
    assert text.count("pictures go through the encoder once") == 1
    train_rice.main(command(tmp_path / "one", *alone))
    for together, single in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        assert together["loss"] == pytest.approx(single["loss"], rel=2e-3)
