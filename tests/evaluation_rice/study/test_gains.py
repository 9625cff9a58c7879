import json
import shutil

import numpy as np
import pytest
from PIL import Image

from evaluation_rice.study import gains
from evaluation_rice.study.gains import compare, group_gains, one_sided

CATEGORIES = ["mug", "mug", "lamp", "lamp"]


@pytest.fixture
def shop(tmp_path):
    """A shop_clips folder with four test clips, in another order than their ids."""
    root = tmp_path / "shop"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "a.png")
    gallery = [{"gallery_id": "a", "image": "images/a.png", "title": "a"}]
    clips = [
        {"query_id": f"q{i}", "frames": ["images/a.png"], "gt_gallery_ids": ["a"], "category": CATEGORIES[i]}
        for i in (2, 0, 3, 1)
    ]
    for name, rows in (("gallery", gallery), ("clips_test", clips)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def write(tmp_path, shop):
    """Writes an evaluation: hits by embedding, and misses by all that is fused."""

    def save(name, hits, task="abc", **more):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        protocol = {"split": "test", "task_sha256": task}
        results = {"protocol": protocol, "num_queries": len(hits), "scores": {}, "dataset": str(shop), **more}
        (folder / "results.json").write_text(json.dumps(results))
        rows = [{"query_id": f"q{i}", "embedding": 1 if hit else 2, "fused": None} for i, hit in enumerate(hits)]
        (folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        return str(folder)

    return save


def test_gains_of_groups_whose_hits_are_known():
    left = {0: np.array([1.0, 1, 0, 0, 1]), 1: np.array([1.0, 0, 0, 0, 1])}
    right = {0: np.array([0.0, 0, 1, 0, 1]), 1: np.array([0.0, 0, 1, 0, 1])}
    rows = group_gains(left, right, {"category": ["b", "b", "a", "a", "c"], "scale": ["s"] * 5})
    assert [(row["column"], row["group"], row["num_queries"]) for row in rows] == [
        ("category", "b", 2),
        ("scale", "s", 5),
        ("category", "c", 1),
        ("category", "a", 2),
    ]
    assert [row["difference"] for row in rows] == pytest.approx([0.75, 0.1, 0.0, -0.5])
    assert (rows[0]["left"], rows[0]["right"]) == (0.75, 0.0)
    # The first clip gains in both seeds and the second in one: a clip's seeds are drawn together.
    assert rows[0]["ci95"] == pytest.approx([0.5, 1.0]) and rows[3]["ci95"] == pytest.approx([-1.0, 0.0])


def test_groups_of_several_shops_resample_shops():
    left, right = {0: np.ones(6)}, {0: np.array([1.0, 1, 1, 0, 0, 0])}
    shops = ["x", "x", "x", "y", "y", "y"]
    rows = group_gains(left, right, {"category": ["a"] * 6, "half": ["b", "b", "b", "c", "c", "c"]}, shops)
    intervals = {row["group"]: row["ci95"] for row in rows}
    assert intervals["a"] == [0.0, 1.0]
    # Three equal clips: Wilson's share of others is 0.561, with differences from -1 to 1.
    assert intervals["b"] == pytest.approx([-0.561, 0.561], abs=1e-3)
    assert intervals["c"] == pytest.approx([1 - 2 * 0.561, 1.0], abs=2e-3)


def test_clips_that_only_one_side_gets_right():
    ids = ["a", "b", "c", "d", "e"]
    left = {0: np.array([1.0, 1, 1, 0, 0]), 1: np.array([0.0, 1, 0, 0, 0])}
    right = {0: np.array([0.0, 0, 0, 1, 0]), 1: np.array([0.0, 0, 1, 1, 0])}
    answers = one_sided(ids, left, right)
    assert answers["left_queries"] == [{"query_id": "b", "seeds": 2}, {"query_id": "a", "seeds": 1}]
    assert answers["right_queries"] == [{"query_id": "d", "seeds": 2}]
    counts = [answers[name] for name in ("both", "left_only", "right_only", "neither")]
    assert counts == [0, 4, 3, 3]


def test_groups_are_those_of_the_evaluated_clips(write):
    result = compare(write("one", [1, 1, 0, 1]), write("two", [0, 0, 0, 1]), "embedding")
    assert [(row["group"], row["difference"]) for row in result["groups"]] == [("mug", 1.0), ("lamp", 0.0)]
    assert result["all"]["difference"] == 0.5
    assert [query["query_id"] for query in result["answers"]["left_queries"]] == ["q0", "q1"]


def test_head_and_tail_are_those_of_the_models_training_data(write, shop, tmp_path):
    """The evaluated folder has no training clips; the model saw mugs alone."""
    own = shutil.copytree(shop, tmp_path / "own")
    clip = json.loads((own / "clips_test.jsonl").read_text().splitlines()[0])
    (own / "clips_train.jsonl").write_text(json.dumps(clip | {"query_id": "t0", "category": "mug"}) + "\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "train_arguments.json").write_text(json.dumps({"dataset": "shop_clips", "data_dir": str(own)}))
    one, two = (write(name, [1, 1, 0, 1], model=str(model)) for name in ("one", "two"))
    groups = compare(one, two, "embedding")["groups"]
    assert {row["group"] for row in groups if row["column"] == "head_tail"} == {"head", "not in training"}


def test_seeds_are_paired_by_name(write, tmp_path):
    for name, hits in (("left/seed0", [1, 1, 1, 1]), ("left/seed2", [1, 1, 0, 0])):
        write(f"{name}/eval", hits)
    for name, hits in (("right/seed1", [1, 1, 1, 1]), ("right/seed2", [0, 0, 0, 0])):
        write(f"{name}/eval", hits)
    result = compare(str(tmp_path / "left"), str(tmp_path / "right"), "embedding")
    assert result["all"]["seeds"] == ["seed2"] and result["all"]["difference"] == 0.5


def test_each_side_has_its_own_score(write, capsys):
    folder = write("one", [1, 1, 0, 1])
    gains.main([folder, folder, "--right_score", "fused"])
    text = capsys.readouterr().out
    assert "| category | mug | 2 | 100.0 | 0.0 | +100.0 | -31.5 to +100.0 |" in text
    assert "only left 3, only right 0, neither 1" in text
    assert "clips that only left gets right: 3; first, with seeds: q0 (1), q1 (1), q3 (1)" in text


def test_the_result_is_written_as_json(write, tmp_path):
    output = tmp_path / "gains.json"
    gains.main([write("one", [1, 1, 0, 1]), write("two", [0, 0, 0, 1]), "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["score"] == "embedding" and len(result["groups"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{one}", "{two}", "--score", "matching"], "lacks 'matching' scores of some clips; it has embedding, fused"),
        (["{one}", "{other}"], "different protocols: task_sha256 is 'abc' and 'another'"),
        (["{one}", "nowhere"], "nowhere has no results.json: name the folder of an evaluation by eval_rice.py, or"),
        (["{one}", "{two}", "--output", "{one}"], "one is a folder: name a file in it."),
        (["{one}", "{two}", "--output", "{one}/results.json/x"], "results.json is a file: name another folder."),
        (["{one}", "X=nowhere"], "X=nowhere has no results.json"),
        (["{renamed}", "{renamed}"], "has other clips than the evaluation: name the evaluated folder"),
    ],
)
def test_refusals(write, capsys, arguments, words):
    folders = {"one": write("one", [1, 1, 0, 1]), "two": write("two", [1, 1, 0, 1])}
    folders["other"] = write("other", [1, 1, 0, 1], task="another")
    folders["renamed"] = write("renamed", [1, 1, 0, 1, 1])
    with pytest.raises(SystemExit) as end:
        gains.main([argument.format(**folders) for argument in arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err
