import ast
import json
import random
import re
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard

from evaluation_rice.recall import recall_at_k

FOLDER = Path(__file__).resolve().parents[2] / "metrics" / "livestream_recall"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """The metric loaded from a copy of its folder alone, as it would lie on the Hub."""
    alone = tmp_path_factory.mktemp("hub") / "livestream_recall"
    shutil.copytree(FOLDER, alone)
    return evaluate.load(str(alone), cache_dir=str(tmp_path_factory.mktemp("cache")))


def draw(rng, num_queries=None):
    """Random rankings and right images: empty, short, repeated, and with images that are nowhere."""
    images = [f"image-{i}" for i in range(rng.randint(1, 30))]
    rankings, relevant = {}, {}
    for i in range(num_queries or rng.randint(1, 40)):
        rankings[f"q{i}"] = rng.choices(images, k=rng.randint(0, 12)) if rng.random() < 0.3 else shuffled(rng, images)
        relevant[f"q{i}"] = rng.sample([*images, "elsewhere"], rng.randint(0, min(4, len(images))))
    return rankings, relevant


def shuffled(rng, images):
    return rng.sample(images, rng.randint(0, len(images)))


def test_agrees_with_recall_at_k(metric):
    rng = random.Random(0)
    for _ in range(40):
        rankings, relevant = draw(rng)
        ks = tuple(rng.sample(range(1, 40), rng.randint(1, 4)))
        computed = metric.compute(predictions=list(rankings.values()), references=list(relevant.values()), ks=ks)
        assert computed == recall_at_k(rankings, relevant, ks)


def test_galleries_cut_rankings_to_the_clips_own_livestream(metric):
    rng = random.Random(1)
    rankings, relevant = draw(rng, num_queries=60)
    images = sorted({image for ranking in rankings.values() for image in ranking})
    galleries = {live: shuffled(rng, images) for live in ("a", "b", "c")}
    lives = {query: rng.choice("abc") for query in rankings}
    cut = {q: [image for image in ranking if image in galleries[lives[q]]] for q, ranking in rankings.items()}
    computed = metric.compute(
        predictions=list(rankings.values()),
        references=list(relevant.values()),
        live_ids=list(lives.values()),
        galleries=galleries,
        ks=(1, 4),
    )
    by_livestream = computed.pop("by_livestream")
    assert computed == recall_at_k(cut, relevant, (1, 4)) != recall_at_k(rankings, relevant, (1, 4))
    for live, figures in by_livestream.items():
        own = {query: relevant[query] for query in relevant if lives[query] == live}
        assert figures.pop("num_clips") == len(own)
        assert figures == recall_at_k({query: cut[query] for query in own}, own, (1, 4))


def test_batches_add_up(metric):
    rankings, relevant = draw(random.Random(2), num_queries=20)
    predictions, references = list(rankings.values()), list(relevant.values())
    for start in range(0, 20, 7):
        metric.add_batch(predictions=predictions[start : start + 7], references=references[start : start + 7])
    assert metric.compute() == recall_at_k(rankings, relevant)


def test_refuses_livestreams_that_do_not_fit(metric):
    given = {"predictions": [["a"], ["b"]], "references": [["a"], ["b"]]}
    for words, more in (
        ("give one per clip", {"live_ids": ["x"]}),
        ("needs live_ids", {"galleries": {"x": ["a"]}}),
        ("lacks the livestream 'y'", {"live_ids": ["x", "y"], "galleries": {"x": ["a"]}}),
    ):
        with pytest.raises(ValueError, match=words):
            metric.compute(**given, **more)


def test_examples_of_the_card(metric):
    card = (FOLDER / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        call, _, expected = example.partition("\n# {")
        computed = metric.compute(**example_arguments(call[call.index("metric.compute(") :]))
        assert repr(computed) == "{" + expected.strip()


def example_arguments(call):
    """The keyword arguments of a call, all of which are literals."""
    return {word.arg: ast.literal_eval(word.value) for word in ast.parse(call, mode="eval").body.keywords}


def test_card_has_the_metadata_of_evaluate_modules():
    data = RepoCard.load(FOLDER / "README.md").data
    assert data.title and data.description and data.tags == ["evaluate", "metric"] and data.sdk


def test_default_cut_offs_and_empty_ranking(metric):
    assert metric.compute(predictions=[["a"], []], references=[["a", "b"], ["c"]]) == {
        "R@1": 0.5,
        "R@3": 0.5,
        "R@5": 0.5,
        "R@10": 0.5,
    }


@pytest.mark.parametrize("ks", [(), (0,), (1.5,)])
def test_refuses_bad_cut_offs(metric, ks):
    with pytest.raises(ValueError, match="ks"):
        metric.compute(predictions=[["a"]], references=[["a"]], ks=ks)


def test_refuses_strings_and_unequal_lengths(metric):
    with pytest.raises(ValueError):
        metric.compute(predictions=[["a"]], references=["ab"])
    with pytest.raises(ValueError):
        metric.compute(predictions=[["a"]], references=[["a"], ["b"]])


KINDS = {"text": str, "number": int, "numpy": np.int64}


@pytest.mark.parametrize("galleries", KINDS)
@pytest.mark.parametrize("lives", KINDS)
@pytest.mark.parametrize("references", KINDS)
@pytest.mark.parametrize("predictions", KINDS)
def test_texts_and_whole_numbers_are_the_same_ids(metric, predictions, references, lives, galleries):
    first, right, live, own = (KINDS[name] for name in (predictions, references, lives, galleries))
    result = metric.compute(
        predictions=[[first(3), first(1), first(2)], []],
        references=[[right(1)], [right(2)]],
        live_ids=[live(7), live(8)],
        galleries={own(7): [own(1), own(2)], own(8): [own(2)]},
        ks=(1,),
    )
    names = ["7", "8"] if lives == "text" else [7, 8]
    assert result == {
        "R@1": 0.5,
        "by_livestream": {names[0]: {"num_clips": 1, "R@1": 1.0}, names[1]: {"num_clips": 1, "R@1": 0.0}},
    }
    json.dumps(result)


def test_arrays_are_lists(metric):
    given = {"predictions": np.array([[1, 2], [3, 4]]), "references": torch.tensor([[1], [4]])}
    assert metric.compute(**given, ks=np.array([2, 1, 2])) == {"R@2": 1.0, "R@1": 0.5}
    lives = metric.compute(**given, ks=(1,), live_ids=np.array([5, 5]), galleries={5: np.array([2, 4])})
    assert lives == {"R@1": 0.5, "by_livestream": {5: {"num_clips": 2, "R@1": 0.5}}}


def test_one_livestream_under_two_kinds_of_id(metric):
    given = {"predictions": [["a"], ["b"]], "references": [["a"], ["a"]], "ks": (1,)}
    assert metric.compute(**given, live_ids=[7, "7"])["by_livestream"] == {7: {"num_clips": 2, "R@1": 0.5}}


def test_clips_are_added_one_by_one(metric):
    metric.add(prediction=[1, 2], reference=["2"])
    metric.add(prediction=[], reference={"2"})
    assert metric.compute(ks=(1, 2)) == {"R@1": 0.0, "R@2": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predictions": []}, "predictions has 0 clips and references 1|predictions is empty"),
        ({"predictions": [], "references": []}, "predictions is empty: give at least one clip"),
        ({"predictions": None}, "predictions is empty|must be a list"),
        ({"predictions": "a"}, "predictions must be a list with one list of ids per clip, not 'a'"),
        ({"predictions": {"q": ["a"]}}, "predictions must be a list with one list of ids per clip"),
        ({"predictions": ["a"]}, r"predictions\[0\] must be a list of image ids, not 'a'"),
        ({"predictions": [None]}, r"predictions\[0\] must be a list of image ids, not None"),
        ({"predictions": [{"a"}]}, r"predictions\[0\] must be a list of image ids"),
        ({"predictions": [[["a", 0.5]]]}, r"predictions\[0\] holds \['a', 0.5\]: give image ids alone"),
        ({"predictions": [["a", float("nan")]]}, r"predictions\[0\] holds nan: an id is a string or an integer"),
        ({"predictions": np.array([[1.0, 2.0]])}, r"predictions\[0\] holds np.float64\(1.0\): an id is"),
        ({"predictions": [[True]]}, r"predictions\[0\] holds True"),
        ({"references": [None]}, r"references\[0\] must be a list of image ids, not None"),
        ({"references": [[2.0]]}, r"references\[0\] holds 2.0"),
        ({"references": None}, "references must be a list"),
        ({"references": [["a"], ["b"]]}, "predictions has 1 clips and references 2"),
        ({"live_ids": "x"}, "live_ids must be a list with one livestream id per clip, not 'x'"),
        ({"live_ids": [None]}, "live_ids holds None"),
        ({"live_ids": [1.0]}, "live_ids holds 1.0"),
        ({"live_ids": [7], "galleries": [["a"]]}, "galleries must map a livestream id to its image ids"),
        ({"live_ids": [7], "galleries": {7: "ab"}}, r"galleries\[7\] must be a list of image ids, not 'ab'"),
        ({"live_ids": [7], "galleries": {7: [1.0]}}, r"galleries\[7\] holds 1.0"),
        ({"live_ids": [7], "galleries": {7: ["a"], "7": ["b"]}}, "galleries has livestream '7' twice"),
        ({"live_ids": [7], "galleries": {8: ["a"]}}, "galleries lacks the livestream '7'"),
        ({"ks": 5}, "ks must be a sequence"),
        ({"ks": "15"}, "ks must be a sequence"),
    ],
)
def test_input_that_would_be_counted_wrongly_is_refused_in_one_sentence(metric, change, words):
    with pytest.raises(ValueError, match=words) as error:
        metric.compute(**{"predictions": [["a"]], "references": [["a"]], **change})
    assert "\n" not in str(error.value)
    # Nothing of the refused clips is left to be counted with the next.
    assert metric.compute(predictions=[["a"]], references=[["a"]], ks=(1,)) == {"R@1": 1.0}


def test_script_keeps_one_import_per_line():
    lines = (FOLDER / "livestream_recall.py").read_text().splitlines()
    imports = [line for line in lines if re.match(r"(import|from)\s", line)]
    assert imports == ["import datasets", "import evaluate"]
