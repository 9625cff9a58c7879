"""Versions and fingerprints of checkpoint folders. Damaged ones are tested with the commands that meet them."""

import json

import pytest

from hub_rice.checkpoint import check_settings, saved_by_newer, weights_fingerprint
from modeling_rice import RiceConfig


def write_config(folder, **settings):
    (folder / "config.json").write_text(json.dumps({"model_type": "rice", **settings}))
    return folder


@pytest.mark.parametrize(
    "version, newer", [("99.0.0", True), ("4.0.0", False), (None, False), ("no version", False), (7, False)]
)
def test_saved_by_newer(tmp_path, version, newer):
    assert saved_by_newer(write_config(tmp_path, transformers_version=version)) == (version if newer else None)


def test_saved_by_newer_of_what_is_not_there(tmp_path):
    assert saved_by_newer(tmp_path / "gone") is None and saved_by_newer("someone/not-cached") is None
    (tmp_path / "config.json").write_text("{cut")
    assert saved_by_newer(tmp_path) is None


def test_settings_of_a_saved_config_are_known(tmp_path):
    config = RiceConfig(pad_token_id=0, bos_token_id=2)
    # What Trainer adds.
    config.use_cache = False
    config.save_pretrained(tmp_path)
    check_settings(tmp_path, RiceConfig)


def test_an_unknown_setting_is_named(tmp_path):
    write_config(tmp_path, warp_drive=9)
    with pytest.raises(ValueError, match="newer version of this project: .* 'warp_drive'"):
        check_settings(tmp_path, RiceConfig)
    check_settings(write_config(tmp_path, warp_drive=9, model_type="bert"), RiceConfig)


def test_fingerprint_follows_the_weights_alone(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    first = weights_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(tmp_path) == first and len(first) == 64
    (tmp_path / "model-2.safetensors").write_bytes(b"2")
    assert weights_fingerprint(tmp_path) != first and weights_fingerprint("someone/rice") is None
