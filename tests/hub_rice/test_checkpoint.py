"""Versions and fingerprints of checkpoint folders. Damaged folders are tested with the commands that read them."""

import json
import shutil
from hashlib import sha256

import pytest

from hub_rice.checkpoint import check_checkpoint, check_hashes, saved_by_newer, weight_files, weights_fingerprint
from hub_rice.loading import load_model
from modeling_rice import RiceModel


def write_config(folder, **settings):
    (folder / "config.json").write_text(json.dumps({"model_type": "rice", **settings}))
    return folder


@pytest.mark.parametrize(
    "version, newer", [("99.0.0", True), ("4.0.0", False), (None, False), ("no version", False), (7, False)]
)
def test_saved_by_a_newer_version(tmp_path, version, newer):
    assert saved_by_newer(write_config(tmp_path, transformers_version=version)) == (version if newer else None)


def test_saved_by_newer_without_a_readable_config(tmp_path):
    assert saved_by_newer(tmp_path / "gone") is None and saved_by_newer("someone/not-cached") is None
    (tmp_path / "config.json").write_text("{cut")
    assert saved_by_newer(tmp_path) is None


def test_fingerprint_follows_the_model_s_own_weights_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = weights_fingerprint(tmp_path)
    # As results of earlier versions have it: over the hashes of the files.
    assert first == sha256(sha256(b"one").digest()).hexdigest()
    # An encoded shop that lies in the run's folder, and what belongs to no model.
    (tmp_path / "gallery.safetensors").write_bytes(b"shop")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_fingerprint(tmp_path) != first
    assert weights_fingerprint("someone/rice") is None
    (tmp_path / "model.safetensors").unlink()
    assert weights_fingerprint(tmp_path) is None


def test_shards_are_those_of_the_index(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[1], "b": names[0], "c": names[1]}}))
    assert [path.name for path in weight_files(tmp_path)] == names
    assert weights_fingerprint(tmp_path) is None
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    assert len(weights_fingerprint(tmp_path)) == 64
    # As transformers does it, one file goes before shards.
    (tmp_path / "model.safetensors").write_bytes(b"one")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', "{cut"]
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        check_checkpoint(tmp_path)


def test_a_flipped_bit_is_detected(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    check_hashes(folder)
    load_model(folder, "cpu")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="model.safetensors is not what was saved"):
        load_model(folder, "cpu")
    load_model(folder, "cpu", check_weights=False)
    (folder / "model.sha256").unlink()
    load_model(folder, "cpu")


def test_hashes_are_in_the_format_of_sha256sum(tiny_checkpoint, tmp_path):
    model = RiceModel.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="80KB")
    lines = (tmp_path / "model.sha256").read_text().splitlines()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert lines == [f"{sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" for name in files]
    check_hashes(tmp_path)
    (tmp_path / files[0]).write_bytes(b"other")
    with pytest.raises(ValueError, match=f"{files[0]} is not what was saved"):
        check_hashes(tmp_path)
    model.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/model.sha256").read_text().endswith("  model.fp16.safetensors\n")
