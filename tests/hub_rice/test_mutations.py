"""JSON of a model folder that a stranger wrote, or that was damaged: it is refused in one sentence, or it works."""

import copy
import json
import random
import shutil

import pytest
from huggingface_hub import ModelCard

from hub_rice.loading import load_model
from hub_rice.model_card import breakdown_page, model_card
from hub_rice.results import portable_results, read_results
from hub_rice.training_record import license_of

RECALL = {"R@1": 0.25, "R@5": 0.5, "R@1_ci95": [0.1, 0.4]}
RESULTS = {
    "protocol": {"split": "test", "gallery_scope": "live", "num_galleries": 2, "num_gallery_images": 90}
    | {"boxes": "none", "fusion": {"source_words": "fitted", "edge_words": ["at the edge"]}, "interval": "bootstrap"},
    "num_queries": 77,
    "gallery_size": {"min": 40, "median": 45.0, "max": 50},
    "scores": {"embedding": RECALL, "fused": RECALL},
    "fusion_weight": 0.4,
    "fused_text_weight": 2.5,
    "baselines": {"chance": {"R@1": 0.02, "R@5": 0.1}},
    "by": {"category": {"mugs": {"num_queries": 7, "embedding": RECALL}}},
    "model": "runs/x",
    "dataset": "mini_lpr4m",
    "failures": [{"kind": "query", "id": "q", "file": "/home/me/q.jpg", "reason": "no image"}],
    "ties": {"embedding": {"share": 0.0, "R@1_ties_at_random": 0.25}},
    "versions": {"torch": "2"},
    "command": "python eval_rice.py --model runs/x",
}

MODEL_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
VALUES = (
    None,
    True,
    "text",
    "",
    "32",
    0,
    -1,
    1,
    3,
    2.5,
    10**4,
    10**12,
    -(10**12),
    1e300,
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
)
# What Python's json writes and reads, and what it reads as infinite.
RAW = ("NaN", "Infinity", "1e999", "[" * 5000 + "]" * 5000, '"\\ud800"', "9" * 500)


def places(value, path=()) -> list[tuple]:
    """Where the values of a JSON file stand, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutate(text: str, draw: random.Random) -> tuple[str, str]:
    """A damaged JSON file, and what was done to it."""
    if draw.random() < 0.05:
        end = draw.randrange(len(text))
        return text[:end], f"cut at {end}"
    content = copy.deepcopy(json.loads(text))
    # The first so many, since a vocabulary would take all the turns.
    place = draw.choice(places(content)[:300])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if draw.random() < 0.1:
        del parent[place[-1]]
        return json.dumps(content), f"{place} removed"
    if draw.random() < 0.1:
        raw = draw.choice(RAW)
        parent[place[-1]] = "RAW"
        return json.dumps(content).replace('"RAW"', raw, 1), f"{place} = {raw[:20]}"
    parent[place[-1]] = draw.choice(VALUES)
    return json.dumps(content), f"{place} = {parent[place[-1]]!r}"


def attack(load, folder, names, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Loads a folder with one file after the other damaged: how many were refused, and what went wrong beside that."""
    draw, refused, wrong = random.Random(seed), 0, []
    whole = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    for _ in range(count):
        name = draw.choice(names)
        text, what = mutate(whole[name], draw)
        (folder / name).write_text(text, encoding="utf-8")
        try:
            load(folder)
        except (ValueError, OSError) as error:
            refused += 1
            sentence = str(error)
            if "\n" in sentence or len(sentence) > 1000 or not any(n in sentence for n in (name, str(folder))):
                wrong.append(f"{name}: {what}: {sentence}")
        # What a command would end with as a traceback, such as a panic of the tokenizers' library.
        except BaseException as error:
            wrong.append(f"{name}: {what}: {type(error).__name__}: {error}")
        (folder / name).write_text(whole[name], encoding="utf-8")
    return refused, wrong


@pytest.mark.parametrize("count", [160, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_model_of_damaged_files_is_refused_or_works(tiny_checkpoint, tmp_path, count):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    refused, wrong = attack(lambda folder: load_model(folder, "cpu"), folder, MODEL_FILES, count, seed=count)
    assert not wrong, "\n".join(wrong)
    assert refused > count / 4


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_damaged_records_are_refused_or_make_a_card(tmp_path, count):
    """results.json and train_arguments.json, through what `rice publish` makes of them."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "train_results.json").write_text(json.dumps({"train_runtime": 120.0}))
    arguments = {"dataset": "mini_lpr4m", "data_dir": None, "max_steps": 8, "learning_rate": 0.1, "num_processes": 2}
    arguments |= {"model_name_or_path": None, "init_vision_from": "openai/clip", "freeze": ["a"], "model": {"a": 1}}
    (tmp_path / "train_arguments.json").write_text(json.dumps(arguments))

    def publish(folder):
        results = portable_results(read_results(folder / "results.json"), "someone/rice")
        license_of(folder)
        json.dumps(results, allow_nan=False)
        text = model_card(results, model_id="someone/rice", run_dir=folder)
        assert ModelCard(text).data.model_name == "someone/rice"
        breakdown_page(results)

    publish(tmp_path)
    names = ("results.json", "train_arguments.json", "train_results.json")
    refused, wrong = attack(publish, tmp_path, names, count, seed=count)
    assert not wrong, "\n".join(wrong)
    assert refused > count / 4
