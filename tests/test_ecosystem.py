"""The blocks of docs/ecosystem.md, each run as it stands, and their results."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig

import eval_rice
from data_rice.mini_lpr4m import render_mini_lpr4m
from hub_rice.dataset_card import dataset_card, load_configs
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ecosystem.md"
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M))
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODERS = {
    "clip": lambda: CLIPVisionConfig(**TINY, image_size=32, patch_size=8),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A rendered mini LPR4M, and the same as published."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"num_train_lives": 4, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    mini = render_mini_lpr4m(root / "mini", **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)
    return mini, publish(mini, root / "published")


def publish(mini: Path, folder: Path) -> Path:
    """The files that the publishing command puts on the Hub."""
    from datasets.table import embed_table_storage

    configs, listed = load_configs(mini), []
    for config, tables in configs.items():
        (folder / config).mkdir(parents=True)
        for split, table in tables.items():
            embedded = table.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
            embedded.to_parquet(str(folder / config / f"{split}-00000-of-00001.parquet"))
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in tables]
        listed.append({"config_name": config, "data_files": files})
    manifest = json.loads((mini / "mini_lpr4m.json").read_text())
    (folder / "README.md").write_text(dataset_card(manifest, configs, "someone/mini", {"configs": listed}))
    return folder


@pytest.fixture
def place(data, tmp_path, monkeypatch):
    """A function that makes the folder which the page speaks of, with a small model, and goes there."""

    def make(encoder: str = "clip") -> Path:
        torch.manual_seed(0)
        pooling = {} if encoder == "clip" else {"vision_pooling": "mean"}
        config = RiceConfig(vision_config=ENCODERS[encoder](), projection_dim=16, decoder_num_heads=2, **pooling)
        RiceModel(config).save_pretrained(tmp_path / "runs/demo/model")
        tokenizer = train_tokenizer(["a red mug", "blue shoe"] * 20)
        build_processor(tokenizer, 32, 8, 2).save_pretrained(tmp_path / "runs/demo/model")
        for source, name in zip(data, ("data/mini_lpr4m", "someone/mini-lpr4m"), strict=True):
            shutil.copytree(source, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def run(title: str) -> dict:
    """What the block under a heading leaves in its names."""
    for module in re.findall(r"^(?:from|import) (peft|sentence_transformers|mteb)", BLOCKS[title], re.M):
        pytest.importorskip(module, reason=f"the block needs {module}")
    names: dict = {"__name__": "__block__"}
    exec(compile(BLOCKS[title], f"{PAGE.name}: {title}", "exec"), names)
    return names


def changed(one, other) -> set[str]:
    """The parts of a model whose weights differ between two folders."""
    states = [AutoModel.from_pretrained(folder).state_dict() for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    return {name.partition(".")[0] for name, value in states[0].items() if not torch.equal(value, states[1][name])}


def test_the_page_has_a_block_for_each_library():
    assert len(BLOCKS) == PAGE.read_text(encoding="utf-8").count("```python") == 8


def test_generic_code(place, capsys):
    place()
    names = run("Any code for transformers models")
    assert names["images"]["pixel_values"].shape == (1, 3, 32, 32)
    assert capsys.readouterr().out == "16\ntorch.Size([1, 16]) torch.Size([1, 16])\n"


@pytest.mark.parametrize("title", ["transformers' Trainer", "Your own training loop, with accelerate"])
def test_training(place, title):
    root = place()
    run(title)
    folder = root / "runs" / ("trainer" if "Trainer" in title else "loop")
    assert {"vision_model", "decoder", "reconstruction_head"} <= changed(root / "runs/demo/model", folder)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_adapters(place, encoder):
    root = place(encoder)
    names = run("LoRA, with peft")
    parts = changed(root / "runs/demo/model", root / "runs/lora/merged")
    # The ResNet has no linear layer, and its statistics stay.
    assert parts >= {"decoder", "visual_projection"} and ("vision_model" in parts) == (encoder == "clip")
    trainable = [name for name, parameter in names["adapted"].named_parameters() if parameter.requires_grad]
    assert all("lora" in name for name in trainable)


def test_sentence_transformers(place):
    root = place()
    run("sentence-transformers")
    assert changed(root / "runs/demo/model", root / "runs/sentence/final") == {"vision_model", "visual_projection"}


def test_evaluation_is_that_of_the_command(place):
    root = place()
    recall = run("Evaluation")["recall"]
    words = ["--model", "runs/demo/model", "--dataset", "mini_lpr4m", "--output_dir", "out", "--num_workers", "0"]
    eval_rice.main([*words, "--device", "cpu", "--baselines"])
    scores = json.loads((root / "out" / "results.json").read_text())["scores"]["embedding"]
    assert recall == {name: scores[name] for name in recall} and set(recall) == {"R@1", "R@3", "R@5", "R@10"}


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="the export needs onnxscript")
def test_small_numbers(place, capsys):
    place()
    names = run("Half precision and int8")
    assert names["half"].dtype == torch.bfloat16
    cosines = [float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"[01]\.\d+", line)]
    assert len(cosines) == 2 and min(cosines) > 0.99


def test_mteb(place):
    place()
    assert len(run("mteb")["tasks"]) == 1
