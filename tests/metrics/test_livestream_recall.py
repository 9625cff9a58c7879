import random
import re
import shutil
from pathlib import Path

import evaluate
import pytest

from evaluation_rice.recall import recall_at_k

FOLDER = Path(__file__).resolve().parents[2] / "metrics" / "livestream_recall"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """The metric loaded from a copy of its folder alone, as it would lie on the Hub."""
    alone = tmp_path_factory.mktemp("hub") / "livestream_recall"
    shutil.copytree(FOLDER, alone)
    return evaluate.load(str(alone), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_agrees_with_recall_at_k_on_random_rankings(metric):
    rng = random.Random(0)
    images = [f"image-{i}" for i in range(30)]
    rankings = {f"q{i}": rng.sample(images, rng.randint(0, 30)) for i in range(200)}
    relevant = {query: rng.sample(images, rng.randint(0, 4)) for query in rankings}
    rankings["q3"] = rankings["q3"] * 2
    for ks in ((1, 3, 5, 10), (2, 100)):
        computed = metric.compute(predictions=list(rankings.values()), references=list(relevant.values()), ks=ks)
        assert computed == recall_at_k(rankings, relevant, ks)


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


def test_script_keeps_one_import_per_line():
    lines = (FOLDER / "livestream_recall.py").read_text().splitlines()
    imports = [line for line in lines if re.match(r"(import|from)\s", line)]
    assert imports == ["import datasets", "import evaluate"]
