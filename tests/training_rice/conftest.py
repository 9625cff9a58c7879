"""Tiny models and in-memory pairs, queries and a gallery: 32-pixel pictures of one colour."""

import io
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPVisionConfig

from data_rice.features import clip_row, gallery_features, pair_features, query_features
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer
from tests.training_rice.texts import WORDS
from training_rice.arguments import DataArguments, RiceTrainingArguments
from training_rice.feature_cache_encoding import cache_features
from training_rice.setup import build_collators
from training_rice.trainer import RiceTrainer

CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}

PLAIN = {"num_frames": 2, "frame_sampling": "random", "train_num_frames": 1}


@pytest.fixture
def model_settings():
    """Fields of a small configuration without dropout."""
    return {"vision_config": dict(CLIP_VISION), "projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0}


@pytest.fixture
def resnet_settings(model_settings):
    """The same on an encoder with batch norms."""
    return model_settings | {
        "vision_config": dict(RESNET),
        "vision_pooling": "mean",
        "decoder_position_embeddings": False,
    }


@pytest.fixture
def make_model(model_settings):
    """A function that builds a small model, the same each time."""

    def make(settings: dict | None = None, **overrides) -> RiceModel:
        torch.manual_seed(1)
        return RiceModel(RiceConfig(**{**(settings or model_settings), **overrides}))

    return make


@pytest.fixture
def training(tmp_path):
    return RiceTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


@pytest.fixture
def write_checkpoint(make_model, tmp_path):
    """A function that writes a training checkpoint after a step of 10."""
    model = make_model()

    def write(step: int, folder: str = "run") -> str:
        path = tmp_path / folder / f"checkpoint-{step}"
        model.save_pretrained(path)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": step}, path / name)
        path.joinpath("trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 10}))
        return str(path)

    return write


@pytest.fixture
def clip_vision_config():
    return CLIPVisionConfig(**{name: value for name, value in CLIP_VISION.items() if name != "model_type"})


@pytest.fixture(scope="session")
def processor():
    return build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400), 32, 8, 2)


def picture(number: int) -> dict:
    """An image entry whose colour and stripe tell the number."""
    image = Image.new("RGB", (32, 32), ((37 * number) % 256, (91 * number) % 256, (153 * number) % 256))
    image.paste((255 - 20 * (number % 12), 40, 90), (number % 16, 0, number % 16 + 8, 32))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"path": None, "bytes": buffer.getvalue()}


def _clip(number: int, frames: int = 2) -> dict:
    row = clip_row(
        clip_id=f"clip{number}",
        live_id="live",
        product_id=f"product{number}",
        frames=[picture(number + frame) for frame in range(frames)],
        boxes=[None] * frames,
    )
    return row


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    """Twelve pairs; every third clip has one frame only."""
    rows = [
        {**_clip(i, 2 - (i % 3 == 0)), "image_id": f"image{i}", "image": picture(i), "title": "a red mug"}
        for i in range(12)
    ]
    return Dataset.from_list(rows, features=pair_features())


@pytest.fixture(scope="session")
def validation() -> tuple[Dataset, Dataset, str]:
    """Six queries of one livestream with six images."""
    queries = [{**_clip(20 + i), "relevant": [f"image{20 + i}"]} for i in range(6)]
    gallery = [
        {"image_id": f"image{20 + i}", "live_id": "live", "image": picture(20 + i), "title": ""} for i in range(6)
    ]
    return (
        Dataset.from_list(queries, features=query_features()),
        Dataset.from_list(gallery, features=gallery_features()),
        "live",
    )


def _named(rows: Dataset, key: str, words: list[str]) -> Dataset:
    return rows.map(lambda row, i: {key: words[i]}, with_indices=True, features=rows.features)


@pytest.fixture
def text_pairs(pairs):
    return _named(_named(pairs, "title", WORDS), "asr", [f"look at this {words}" for words in WORDS])


@pytest.fixture
def text_validation(validation):
    queries, gallery, scope = validation
    return _named(queries, "asr", [f"we sell {words}" for words in WORDS]), _named(gallery, "title", WORDS), scope


@pytest.fixture
def make_trainer(make_model, processor, pairs, validation, tmp_path):
    """A function that builds a trainer of a frozen encoder, on a cache or on pictures."""

    def make(settings=None, *, cached: bool, data=None, views=None, model=None, **overrides) -> RiceTrainer:
        if cached:
            overrides = {"cache_vision_features": True, "cached_precision": "fp32", **overrides}
        run = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "freeze_vision": True,
        }
        training = RiceTrainingArguments(**{**run, **overrides})
        data = DataArguments(cache_dir=str(tmp_path / "cache"), **{**PLAIN, **(data or {})})
        rows, views = views or (pairs, validation)
        model = model or make_model(settings)
        collators = build_collators(data, processor, str(tmp_path / "failures.jsonl"))
        if cached:
            rows, views, *collators = cache_features(model, rows, views, tuple(collators), data, training)
        return RiceTrainer(
            model=model,
            args=training,
            train_dataset=rows,
            eval_dataset=views,
            data_collator=collators[0],
            eval_collator=collators[1],
            processing_class=processor,
        )

    return make
