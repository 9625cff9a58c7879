"""Which files of a folder are published, and how answers of the Hub are handled, without a Hub."""

import json
import shutil

import pytest
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from hub_rice.repository import hub_errors, is_published, published_files, upload


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "README.md",
    ]
    + ["processor_config.json", "preprocessor_config.json", "tokenizer.json", "modeling_rice.py", "onnx/image.onnx"],
)
def test_published(path):
    assert is_published(path)


@pytest.mark.parametrize(
    "path",
    [
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "trainer_state.json",
        "notes.py",
        ".env",
    ]
    + [
        "train_arguments.json",
        "unreadable_media.jsonl",
        "checkpoint-4/model.safetensors",
        "runs/events.out.1",
        "token",
    ]
    + ["data/config.json", "sub/onnx/image.onnx"],
)
def test_is_not_published(path):
    assert not is_published(path)


def test_only_the_weights_that_the_model_loads_are_published(tiny_checkpoint, tmp_path):
    """One file, beside what a sharded save left; shards; and one shard, which an index names."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")

    def weights() -> list[str]:
        return sorted(name for name in published_files(folder) if ".safetensors" in name)

    index, shards = folder / "model.safetensors.index.json", [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    for name in (*shards, "gallery.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    assert weights() == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert weights() == [*shards, index.name]
    index.write_text(json.dumps({"weight_map": {"a": shards[0]}}))
    assert weights() == [shards[0], index.name]


def test_a_token_in_any_text_is_refused_before_anything_is_sent():
    for path in ("README.md", "results.json", "extra_rice.py"):
        with pytest.raises(ValueError, match=f"{path} holds an access token"):
            upload({"config.json": b"{}", path: b"key = hf_" + b"aB3" * 10}, "me/rice")
    with pytest.raises(ValueError, match="access token"):
        upload({"README.md": b"my-own-secret"}, "me/rice", token="my-own-secret")


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (LocalTokenNotFoundError("x"), PermissionError, "hf auth login"),
        (HFValidationError("x"), ValueError, "of the form owner/name"),
    ],
)
def test_errors_become_one_sentence(error, kind, words):
    with pytest.raises(kind, match=words) as raised:
        with hub_errors("me/rice"):
            try:
                raise error
            except Exception as cause:
                raise OSError("something long\nover lines") from cause
    assert "\n" not in str(raised.value)


def test_other_errors_pass_unchanged(tmp_path):
    own = ValueError("my own sentence.")
    with pytest.raises(ValueError) as raised:
        with hub_errors(str(tmp_path)):
            raise own
    assert raised.value is own


def test_without_the_network_nothing_is_sent():
    with pytest.raises(ConnectionError, match="me/rice needs the Hub, but HF_HUB_OFFLINE is set"):
        upload({"README.md": b"text"}, "me/rice")
