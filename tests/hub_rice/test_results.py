"""results.json: read back, and reduced to the fields that may be published."""

import copy
import json

import pytest

from hub_rice.privacy import is_local, portable, without_paths
from hub_rice.results import FIELDS, portable_results, read_results

RECALL = {"R@1": 0.25, "R@5": 0.5, "R@1_ci95": [0.1, 0.4]}
# Every field that an evaluation writes, with a value of its kind.
RESULTS = {
    "protocol": {
        **{"split": "test", "gallery_scope": "live", "gallery_images": "main", "num_galleries": 2},
        **{"num_gallery_images": 90, "task_sha256": "0" * 64, "duplicate_gallery_rows": 0},
        **{
            "queries_without_relevant_in_gallery": 0,
            "hit": "any",
            "denominator": "every query",
            "tie_order": "gallery",
        },
        **{"interval": "bootstrap", "boxes": "detector", "num_frames": 3, "rank_by": "fused", "ranking_depth": 50},
        **{"precision": "fp32", "asr": "own", "text": {"used": True, "score_weight": None}},
        "detector": {
            **{"file": "/home/me/boxes.jsonl", "detector": "runs/me/detector", "detector_sha256": "1" * 64},
            **{"threshold": 0.5, "labels": ["mug"], "frames_per_clip": 3, "boxes": 7, "frames": 9},
        },
        "fusion": {
            **{
                "rule": "z",
                "text_weight": None,
                "source": "validation",
                "at_edge": False,
                "edge_words": ["at the edge"],
            },
            "source_words": "fitted on the validation split of /home/me/o shop (9 clips)",
            **{"curve": [{"weight": 1.0, "R@1": 0.5}], "text_curve": [{"weight": 1.0, "R@1": 0.5}]},
        },
    },
    "num_queries": 77,
    "gallery_size": {"min": 40, "median": 45.0, "max": 50},
    "scores": {"embedding": RECALL, "fused": RECALL},
    "fusion_weight": 0.4,
    "alignment_weight": None,
    "fused_text_weight": None,
    "baselines": {"chance": {"R@1": 0.02, "R@5": 0.1}},
    "failures": [
        {
            "method": "model",
            "kind": "query",
            "id": "q",
            "file": "/home/me/shop/q.jpg",
            "reason": "no /home/me/shop/q.jpg",
        }
    ],
    "by": {"category": {"home/kitchen": {"num_queries": 7, "embedding": RECALL, "fused": RECALL}}},
    "head_tail": {
        **{"head": ["mugs"], "num_categories": 9, "train_rows": 99, "rule": "r", "missing": "none"},
        **{"dataset": "mini_lpr4m", "data_dir": "/home/me/data"},
    },
    "model": "/home/me/runs/x",
    "model_sha256": "2" * 64,
    "baseline": {"name": "clip", "model": "openai/clip"},
    "parameters": 1000,
    "dataset": "/home/me/my shop",
    "speed": {"device": "cpu", "threads": 1, "image_ms": 1.5},
    "versions": {"torch": "2"},
    "seconds": 1.5,
    "ties": {"embedding": {"share": 0.0, "R@1_ties_at_random": 0.25}},
    "command": "python eval_rice.py --model /home/me/runs/x --dataset '/home/me/my shop' --fit_data_dir=/home/me/o",
}
ROOTS = (
    "/srv/secret lab/data",
    "~/secret/data",
    "C:\\Users\\secret\\data",
    "./secret/data",
    "file:///srv/secret/data",
)


def write(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "results.json"


def test_only_known_fields_are_kept(tmp_path):
    results = read_results(write(tmp_path, {**RESULTS, "notes": "/home/me"}))
    expected = copy.deepcopy(RESULTS)
    del expected["head_tail"]["data_dir"], expected["protocol"]["detector"]["file"]
    assert results == expected
    assert set(FIELDS) == set(RESULTS)


def test_paths_are_removed_and_figures_kept():
    portable = portable_results(RESULTS, "me/rice")
    assert "/home" not in json.dumps(portable) and portable["scores"] == RESULTS["scores"]
    assert portable["model"] == "me/rice" and portable["dataset"] == "my shop"
    assert portable["command"] == "python eval_rice.py --model me/rice --dataset 'my shop' --fit_data_dir=o"
    assert portable["failures"][0] | {"method": 0} == {
        "method": 0, "kind": "query", "id": "q", "file": "q.jpg", "reason": "no q.jpg"
    }  # fmt: skip
    assert portable["protocol"]["fusion"]["source_words"].endswith("validation split of o shop (9 clips)")
    assert portable["by"]["category"].keys() == {"home/kitchen"} and portable["baseline"]["model"] == "openai/clip"
    assert RESULTS["failures"][0]["file"] == "/home/me/shop/q.jpg"


def texts(value, path=()):
    """Where the texts of a JSON value stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if isinstance(value, str) else []) + [p for key, item in items for p in texts(item, (*path, key))]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("words", ["{}", "made of {}", "made of '{}', which is there"])
def test_a_local_path_in_any_field_is_removed(root, words):
    for place in texts(RESULTS):
        results = copy.deepcopy(RESULTS)
        parent = results
        for key in place[:-1]:
            parent = parent[key]
        if place == ("protocol", "gallery_scope"):
            continue
        quoted = words if place != ("command",) else f'python eval_rice.py --model "{root}"'
        parent[place[-1]] = quoted.format(root)
        # What a text in the middle of others means by a blank is known from the fields that are nothing but the path.
        results["head_tail"]["data_dir"] = root
        assert "secret" not in json.dumps(portable_results(results, "me/rice")), place


@pytest.mark.parametrize(
    "text, expected",
    [
        ("no image /home/me/q.jpg", "no image q.jpg"),
        ("/home/me/my shop", "my shop"),
        ("runs/me/model is cut", "model is cut"),
        ("C:\\data\\me\\q.jpg", "q.jpg"),
        ("R@1/R@5 and/or 1/2", "R@1/R@5 and/or 1/2"),
        ("see https://arxiv.org/abs/2308.04912", "see https://arxiv.org/abs/2308.04912"),
        ("openai/clip-vit", "openai/clip-vit"),
        ("商品/标题", "商品/标题"),
        ("", ""),
    ],
)
def test_paths_in_a_text(text, expected):
    assert without_paths(text) == expected and portable({"a": [text]}) == {"a": [expected]}


def test_what_is_local(tmp_path):
    assert all(map(is_local, [str(tmp_path), "./x", "~/x", "a/b/c", "C:\\x", "/x"]))
    assert not any(map(is_local, ["", "mini_lpr4m", "openai/clip"]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scores": []}, "scores is not an object"),
        ({"scores": {}}, "scores is not a table with R@1"),
        ({"scores": {"embedding": {"R@1": "0.5"}}}, "scores.embedding.R@1 is not a number"),
        ({"scores": {"embedding": RECALL, "fused": {"R@1": 0.5}}}, "scores.fused is not a complete table row"),
        ({"scores": {"embedding": {**RECALL, "R@1_ci95": [0.1]}}}, "scores.embedding.R@1_ci95 is not a list of 2"),
        ({"num_queries": True}, "num_queries is not a number"),
        ({"failures": {"a": 1}}, "failures is not a list"),
        (
            {"protocol": {**RESULTS["protocol"], "gallery_scope": "shop"}},
            "protocol.gallery_scope is not one of live, all",
        ),
        ({"protocol": {**RESULTS["protocol"], "boxes": 3}}, "protocol.boxes is not a string"),
        ({"protocol": {**RESULTS["protocol"], "fusion": None}}, "protocol.fusion is not an object"),
        ({"gallery_size": {"min": 1}}, "gallery_size is not an object with median"),
        ({"ties": {"embedding": {}}}, "ties.embedding is not an object with share"),
        (
            {"by": {"c": {"a": {"num_queries": 1}, "b": {}}}},
            "by.c.b is not an object with the fields of the other groups",
        ),
        ({"command": None}, "lacks command"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, change, words):
    file = write(tmp_path, {**RESULTS, **change})
    with pytest.raises(ValueError, match="run eval_rice.py again") as error:
        read_results(file)
    assert str(file) in str(error.value) and words in str(error.value)


def test_only_some_fields_are_required(tmp_path):
    assert read_results(write(tmp_path, {"protocol": {"task_sha256": "a"}}), ["protocol"]) == {
        "protocol": {"task_sha256": "a"}
    }
    with pytest.raises(ValueError, match="lacks scores: run"):
        read_results(tmp_path / "results.json", ["protocol", "scores"])
