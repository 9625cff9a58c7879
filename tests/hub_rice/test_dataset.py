"""The mini LPR4M is published and loaded back unchanged, with a card whose numbers were counted."""

import io
import json
import re

import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from data_rice import load_dataset_view
from data_rice.collator import RiceCollator
from data_rice.streaming import open_dataset_view
from data_rice.views import gallery_scope
from processing_rice import build_processor, train_tokenizer
from tests.hub_rice.test_whole_way import RECIPE

PUBLISH = """
from rice_cli import main

assert main([str(word) for word in arguments]) == 0
"""

COMPARE = """
import io
from pathlib import Path

import datasets
from data_rice import load_dataset_view
from PIL import Image

def picture(value):
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]).convert("RGB").tobytes()

def same(row, local):
    assert row.keys() == local.keys()
    for name, value in local.items():
        if name == "frames":
            assert [frame.convert("RGB").tobytes() for frame in row[name]] == [picture(frame) for frame in value]
        elif name == "image":
            assert row[name].convert("RGB").tobytes() == picture(value)
        else:
            assert row[name] == value, name

result = {}
for config, splits in (
    ("query", ("validation", "test")),
    ("gallery", ("train", "validation", "test")),
    ("pairs", ("train", "validation")),
):
    published = datasets.load_dataset(repo_id, config)
    assert set(published) == set(splits), published
    for split in splits:
        local = load_dataset_view(data_dir, config, split, cache_dir=cache)
        assert len(local) == len(published[split]) > 0
        for row, mine in zip(published[split], local, strict=True):
            same(row, mine)
        result[f"{config}/{split}"] = len(local)
        raw = published[split].cast_column("image", datasets.Image(decode=False)) if config != "query" else []
        assert all("/" not in row["image"]["path"] for row in raw)
"""


@pytest.fixture(scope="module")
def published(running_hub, client, tiny_mini, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    running_hub.heal()
    client(PUBLISH, arguments=["publish-dataset", tiny_mini, "someone/mini", "--cache_dir", cache])
    arguments = {"repo_id": "someone/mini", "data_dir": str(tiny_mini), "cache": str(cache)}
    return client(COMPARE, **arguments), running_hub.files("someone/mini", "datasets")


def test_published_rows_equal_the_rendered_ones(published, running_hub):
    counts, files = published
    assert counts["query/test"] == 5 and counts["pairs/train"] == 30 and counts["gallery/train"] == 15
    assert running_hub.repos["datasets", "someone/mini"].private
    assert {name.partition("/")[0] for name in files if name.endswith(".parquet")} == {"query", "gallery", "pairs"}


def test_no_local_path_is_published(published, tiny_mini):
    everything = b"\n".join(published[1].values())
    assert str(tiny_mini.parent).encode() not in everything and b"hf_Secret" not in everything


def test_card_shows_the_counted_rows(published):
    counts, files = published
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.pretty_name == "Mini LPR4M"
    assert {config["config_name"] for config in card.data.configs} == {"query", "gallery", "pairs"}
    assert "{{" not in card.text and "{%" not in card.text
    line = next(line for line in card.text.splitlines() if line.startswith("| `query`"))
    assert [cell.strip() for cell in line.split("|")[3:6]] == ["", str(counts["query/validation"]), "5"]
    assert "Livestreams: 3 train, 1 validation, 1 test." in card.text
    assert "--num_train_lives 4" in card.text and "--image_size 32" in card.text


def test_example_of_the_card_runs(published, client):
    examples = re.findall(r"```python\n(.*?)```", published[1]["README.md"].decode(), re.DOTALL)
    assert len(examples) == 1
    relevant, shop = client(examples[0] + "\nresult = [queries[0]['relevant'], shop['image_id'][:]]")
    assert set(relevant) <= set(shop) and len(shop) == 5


def test_refusals(hub, client, tiny_mini, tmp_path):
    def says(folder) -> str:
        error, _, said = client.attempt(PUBLISH, arguments=["publish-dataset", str(folder), "someone/not"])
        assert error == "exit 2" and "Traceback" not in said, f"{error}\n{said}"
        return said.strip().splitlines()[-1]

    (tmp_path / "photographs").mkdir()
    assert "has no mini_lpr4m.json, and this command publishes rendered data only" in says(tmp_path / "photographs")
    hub.tokens = {"another"}
    assert "refuses the access token (401) for someone/not" in says(tiny_mini)


PARTS = [("pairs", "train"), ("pairs", "validation"), ("query", "test"), ("gallery", "test"), ("gallery", "train")]

BY_ID = """
from data_rice import load_dataset_view
from data_rice.streaming import open_dataset_view
from data_rice.views import gallery_scope

result = [
    [load_dataset_view(repo_id, view, split, cache_dir=cache)["live_id"][:] for view, split in parts],
    [open_dataset_view(repo_id, view, split)[0]["live_id"] for view, split in parts],
    gallery_scope(repo_id),
]
"""

COMMAND = """
import eval_rice, train_rice

{"train": train_rice.main, "eval": eval_rice.main}[command]([str(word) for word in arguments])
"""


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    """The published data set as it is downloaded."""
    root = tmp_path_factory.mktemp("downloaded")
    for name, content in published[1].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def opened(value):
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]).convert("RGB").tobytes()


@pytest.mark.parametrize("view, split", PARTS)
def test_a_downloaded_folder_gives_the_rows_of_the_builder(folder, tiny_mini, tmp_path, view, split):
    own = load_dataset_view(tiny_mini, view, split, cache_dir=tmp_path)
    rows = load_dataset_view(folder, view, split, cache_dir=tmp_path)
    streamed = open_dataset_view(folder, view, split)
    assert rows.features == own.features and len(rows) == len(own) == len(streamed) > 0
    for i, row in enumerate(own):
        for other in (rows[i], streamed[i]):
            assert other.keys() == row.keys()
            for name, value in row.items():
                if name == "frames":
                    assert [opened(frame) for frame in other[name]] == [opened(frame) for frame in value]
                else:
                    assert opened(other[name]) == opened(value) if name == "image" else other[name] == value
    assert gallery_scope(folder) == gallery_scope(tiny_mini) == "live"
    boxes = [
        load_dataset_view(place, "detection", "train", cache_dir=tmp_path)["boxes"][:] for place in (folder, tiny_mini)
    ]
    assert len(boxes[0]) > 0 and boxes[0][0] in boxes[1]


def test_missing_parts_of_a_published_folder_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="has no train split of query; choose another split"):
        load_dataset_view(folder, "query", "train", cache_dir=tmp_path)
    for load in (load_dataset_view, open_dataset_view):
        with pytest.raises(ValueError, match="was published with fixed rows; leave out validation_fraction"):
            load(folder, "pairs", "train", validation_fraction=0.5)


def test_rows_of_every_source_fit_collator_and_processor(folder, tiny_mini, tmp_path):
    """As the builder, the published set and `datasets` give them, and with pixels in place of files."""
    import datasets
    import numpy as np
    import torch

    processor = build_processor(train_tokenizer(["a red mug"] * 9), 32, 16, 3)
    pictures = datasets.load_dataset(str(folder), "pairs", split="train", cache_dir=str(tmp_path))
    row = load_dataset_view(tiny_mini, "pairs", "train", cache_dir=tmp_path)[0]

    def with_pixels(convert):
        return row | {"image": convert(pictures[0]["image"]), "frames": [convert(f) for f in pictures[0]["frames"]]}

    def as_bytes(picture):
        file = io.BytesIO()
        picture.save(file, "png")
        return file.getvalue()

    rows = [
        row,
        load_dataset_view(folder, "pairs", "train", cache_dir=tmp_path)[0],
        open_dataset_view(folder, "pairs", "train")[0],
        pictures[0],
        row | {"image": row["image"]["path"], "frames": [frame["path"] for frame in row["frames"]]},
        with_pixels(as_bytes),
        with_pixels(lambda picture: {"bytes": as_bytes(picture), "path": None}),
        with_pixels(np.asarray),
        with_pixels(lambda picture: torch.from_numpy(np.array(picture)).movedim(-1, 0)),
        with_pixels(lambda picture: np.asarray(picture) / 255),
    ]
    rows.append(rows[7] | {"frames": np.stack(rows[7]["frames"])})
    collator = RiceCollator(processor)
    expected = collator([row])
    for other in rows:
        batch = collator([other])
        inputs = processor(images=other["image"], videos=[other["frames"]], titles=other["title"], asr=other["asr"])
        flat = processor(images=[other["image"]], videos=other["frames"]) if other is not rows[4] else inputs
        for name in ("pixel_values", "pixel_values_videos"):
            for pixels in (batch[name], inputs[name], flat[name]):
                torch.testing.assert_close(pixels, expected[name], rtol=0, atol=0.01)
    _, readable, failures = collator.collate_gallery([{"image_id": "a", "image": np.zeros((4, 4, 7), np.uint8)}])
    assert readable == [] and "got shape (4, 4, 7)" in failures[0]["reason"]


def test_a_published_set_is_loaded_by_its_id(published, client, tiny_mini, tmp_path):
    own = [load_dataset_view(tiny_mini, *part, cache_dir=tmp_path)["live_id"][:] for part in PARTS]
    result = client(BY_ID, repo_id="someone/mini", parts=PARTS, cache=str(tmp_path / "cache"))
    assert result == [own, [lives[0] for lives in own], "live"]
    error, _, _ = client.attempt(BY_ID, repo_id="someone/nothing", parts=PARTS, cache=str(tmp_path / "cache"))
    assert "'someone/nothing' is not a local folder, and as a data set of the Hub it cannot be fetched" in error


@pytest.mark.slow
def test_training_and_evaluation_from_published_data_are_those_from_the_raw(
    published, client, folder, tiny_mini, tmp_path
):
    recipe = {name: value for name, value in RECIPE.items() if name != "validation_fraction"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    cache = ["--cache_dir", tmp_path / "cache"]
    origins = {"raw": ["--dataset", "mini_lpr4m", "--data_dir", tiny_mini], "folder": ["--dataset", folder]}
    origins |= {"id": ["--dataset", "someone/mini"], "streamed": ["--dataset", "someone/mini", "--streaming", "true"]}
    evaluation = ["--num_workers", "0", "--device", "cpu", *cache]
    rankings, results = {}, {}
    for name, origin in origins.items():
        output = tmp_path / name
        client(COMMAND, command="train", arguments=[tmp_path / "recipe.yaml", *origin, *cache, "--output_dir", output])
        words = ["--model", output, *origin[: 4 if name == "raw" else 2], *evaluation, "--output_dir", output / "eval"]
        client(COMMAND, command="eval", arguments=words)
        rankings[name] = (output / "eval" / "rankings.jsonl").read_text()
        results[name] = json.loads((output / "eval" / "results.json").read_text())
    for name in ("folder", "id"):
        assert rankings[name] == rankings["raw"] and results[name]["scores"] == results["raw"]["scores"]
    # The same pairs in another order.
    assert results["streamed"]["protocol"]["task_sha256"] == results["raw"]["protocol"]["task_sha256"]
    assert results["streamed"]["num_queries"] == 5
