"""The mini LPR4M goes to the Hub and comes back the same, with a card that was counted and not typed."""

import re

import pytest
from huggingface_hub import DatasetCard

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
for config, view, splits in (
    ("query", "query", ("validation", "test")),
    ("gallery", "gallery", ("train", "validation", "test")),
    ("pairs", "pairs", ("train", "validation")),
):
    published = datasets.load_dataset(repo_id, config)
    assert set(published) == set(splits), published
    for split in splits:
        local = load_dataset_view(data_dir, view, split, cache_dir=cache)
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


def test_rows_come_back_the_same(published, running_hub):
    counts, files = published
    assert counts["query/test"] == 5 and counts["pairs/train"] == 30 and counts["gallery/train"] == 15
    assert running_hub.repos["datasets", "someone/mini"].private
    assert {name.partition("/")[0] for name in files if name.endswith(".parquet")} == {"query", "gallery", "pairs"}


def test_no_path_of_this_machine_goes_along(published, tiny_mini):
    everything = b"\n".join(published[1].values())
    assert str(tiny_mini.parent).encode() not in everything and b"hf_Secret" not in everything


def test_card_tells_what_was_counted(published):
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
    assert "has no mini_lpr4m.json: render it by" in says(tmp_path / "photographs")
    hub.tokens = {"another"}
    assert "refuses the access token (401) for someone/not" in says(tiny_mini)
