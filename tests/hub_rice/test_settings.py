"""Settings of an untrusted model: refused by name before anything is built."""

import json
import shutil

import pytest

from hub_rice.loading import load_model
from hub_rice.settings import check_known, read_config
from modeling_rice import RiceConfig


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def change(path, **fields):
    """Changes fields of a JSON file; `a__b` is a field of the object `a`."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        section = content
        for parent in parents:
            section = section[parent]
        section[last] = value
    path.write_text(json.dumps(content))


def test_settings_of_a_saved_config_are_known():
    config = RiceConfig(pad_token_id=0, bos_token_id=2)
    # What Trainer adds.
    config.use_cache = False
    check_known(config.to_dict(), "x")


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="x was saved by a newer version of this project: .* 'warp_drive'"):
        check_known({"model_type": "rice", "warp_drive": 9}, "x")


def test_a_whole_config_is_read(folder):
    assert read_config(folder, "x").to_dict() == RiceConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "bert"}, "x holds a bert model, not a RICE checkpoint"),
        ({"model_type": None}, "x holds a None model"),
        ({"projection_dim": "32"}, "config.json: Field 'projection_dim' expected int, got str"),
        ({"vision_config": []}, "vision_config"),
        ({"vision_config__hidden_size": -5}, "vision_config.hidden_size=-5 cannot be used"),
        ({"vision_config__num_attention_heads": 0}, "vision_config.num_attention_heads=0 cannot be used"),
        ({"vision_config__model_type": "clip_of_2031"}, "vision_config.model_type='clip_of_2031' cannot be used"),
        ({"decoder_num_heads": 3}, "decoder_num_heads=3 cannot be used .*multiple"),
        ({"decoder_num_self_layers": 900000}, "decoder_num_self_layers is 900000, but there are [0-9]+ weights"),
        ({"vision_config__num_hidden_layers": 900000}, "vision_config.num_hidden_layers is 900000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, which is too large for a model"),
        (
            {"vision_config__intermediate_size": 10**5},
            "mlp.fc1.weight has shape .64, 32. instead of .100000, 32.",
        ),
        ({"vision_config__auto_map": {"AutoModel": "a.B"}}, "vision_config.auto_map names Python code"),
        ({"logit_scale_init_value": 1e300 * 1e10}, "Infinity is not a number"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_its_field(folder, fields, words):
    change(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=words) as error:
        read_config(folder, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"video_processor__num_frames": "3"}, "video_processor Field 'num_frames' .*'3'"),
        ({"video_processor__num_frames": 0}, "video_processor.num_frames is 0, which is out of range"),
        ({"video_processor__num_frames": 10**5}, "video_processor.num_frames is 100000, which is out of range"),
        ({"image_processor__size__height": 10**5}, "image_processor.size.height is 100000, which is out of range"),
        ({"image_processor__size": "large"}, "image_processor Field 'size'"),
        ({"image_processor__image_std": [0, 1, 1]}, "image_processor.image_std is 0, which is out of range"),
        ({"image_processor__resample": 99}, "image_processor.resample is 99, which is out of range"),
        ({"image_processor": []}, "image_processor is not a JSON object"),
        ({"video_processor__sampling": "backwards"}, "cannot be used .*backwards"),
        ({"video_processor__size": {"height": 48, "width": 48}}, "encoder takes"),
    ],
)
def test_a_processor_that_cannot_be_used_is_refused(folder, fields, words):
    change(folder / "processor_config.json", **fields)
    with pytest.raises(ValueError, match=words) as error:
        load_model(folder, "cpu")
    assert "\n" not in str(error.value)


def test_whole_numbers_are_accepted_as_fractions(folder):
    change(
        folder / "processor_config.json", image_processor__image_std=[1, 1, 1], image_processor__image_mean=[0, 0, 0]
    )
    load_model(folder, "cpu")


@pytest.mark.parametrize("content", ["{cut", "[]", '{"model": 3}'])
def test_a_damaged_vocabulary_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_model(folder, "cpu")
