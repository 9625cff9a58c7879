import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from evaluation_rice.protocol import Rankings, RetrievalTask, breakdown
from evaluation_rice.report.html_plots import Bar, bar_plot, curve_plot, group_bars
from evaluation_rice.report.html_report import (
    Evaluation,
    by_livestream,
    choose_examples,
    html_report,
    write_html_report,
)
from evaluation_rice.retrieval import Loading, ModelRetriever, retrieve
from evaluation_rice.speed import TimedRetriever
from hub_rice.tables import percent
from modeling_rice.scoring_rice import FusionWeights

CURVE = [{"weight": 0.1, "R@1": 0.5, "MRR": 0.6}, {"weight": 2.0, "R@1": 0.75, "MRR": 0.8}]
FAILURE = {"method": "model", "kind": "query", "id": "e", "file": "e0.png", "reason": "cut <short> & odd"}


@pytest.fixture
def evaluate(model, collator, shop):
    """A function that evaluates the small model on the small shop, and returns what a report needs."""

    def run(heat=None, **changes) -> Evaluation:
        queries, gallery = shop.queries, shop.gallery
        task = RetrievalTask.from_datasets(queries, gallery, "live")
        retriever = TimedRetriever(ModelRetriever(model, collator))
        loading, weights = Loading(2, 0, quiet=True), FusionWeights(2.0)
        rankings, _ = retrieve(retriever, task, queries, gallery, loading=loading, weights=weights)
        fusion = {"rule": "z(a) + weight * z(b)", "source_words": "the weight was fitted", "curve": CURVE}
        protocol = {
            "split": "test",
            "gallery_scope": "live",
            "num_galleries": 2,
            "num_gallery_images": 6,
            "boxes": "none",
            "num_frames": 2,
            "rank_by": "fused",
            "hit": "any relevant image among the first k",
            "denominator": "every query",
            "tie_order": "gallery order",
            "interval": "bootstrap",
            "queries_without_relevant_in_gallery": 0,
            "fusion": fusion,
        }
        results = {
            "protocol": protocol,
            "num_queries": 5,
            "gallery_size": task.gallery_size(),
            "scores": {kind: ranked.summary() for kind, ranked in rankings.items()},
            "fusion_weight": 2.0,
            "baselines": {"chance": {f"R@{k}": 0.1 for k in (1, 3, 5, 10)}},
            "by": breakdown(queries, rankings),
            "model": "someone/<model>",
            "dataset": "a_shop",
            "seconds": 3.2,
            "speed": retriever.summary(),
            "failures": [FAILURE],
            "ties": {kind: ranked.tie_summary() for kind, ranked in rankings.items()},
            "versions": {"torch": "1.2.3"},
            "command": "python eval_rice.py --model 'a & b'",
            **changes,
        }
        return Evaluation(results, task, rankings, queries, gallery, heat)

    return run


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def rows_of(table: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_page_is_well_formed_and_needs_no_other_file(evaluate, tmp_path):
    write_html_report(tmp_path, evaluate())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    root = parse(page)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
    sources = [value for element in root.iter() for name, value in element.items() if name in ("src", "href")]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).load()
    assert [meta.get("content") for meta in root.iter("meta")][1].startswith("default-src 'none'")


def test_figures_equal_those_of_the_results(evaluate):
    evaluation = evaluate()
    results = json.loads(json.dumps(evaluation.results))
    root = parse(html_report(evaluation))
    table = rows_of(next(root.iter("table")))
    methods = {**results["scores"], **results["baselines"]}
    assert table[0] == ["method", "R@1", "R@3", "R@5", "R@10", "95 % of R@1"]
    for row, values in zip(table[1:], methods.values(), strict=True):
        assert row[1:5] == [percent(values[f"R@{k}"]) for k in (1, 3, 5, 10)]
        interval = values.get("R@1_ci95")
        assert row[5] == (f"{percent(interval[0])} to {percent(interval[1])}" if interval else "")
    plots = {
        svg.get("aria-label"): ["".join(text.itertext()) for text in svg.iter("text")] for svg in root.iter("svg")
    }
    group = results["by"]["category"]["hat"]
    assert f"{percent(group['fused']['R@1'])} of 3" in plots["By category"]
    words = "".join(root.itertext())
    assert f"{results['speed']['clip_ms']:.2f} ms" in words and f"{results['speed']['image_ms']:.2f} ms" in words
    assert results["command"] in words and "cut <short> & odd" in words and "1.2.3" in words


def test_marks_the_right_image_and_shows_heat_of_the_pair(evaluate):
    asked = []

    def heat(query, image):
        asked.append((query["clip_id"], image["image_id"]))
        return [Image.new("RGB", (30, 20), (9, 9, 9))] * 2

    evaluation = evaluate(heat)
    root = parse(html_report(evaluation))
    ranks = evaluation.rankings["fused"].first_relevant_ranks()
    assert len([figure for figure in root.iter("figure") if figure.get("class") == "right"]) == len(ranks)
    assert {query for query, _ in asked} == set(ranks)
    for query, rank in ranks.items():
        relevant = evaluation.task.relevant[query][0]
        first = evaluation.rankings["fused"].rankings[query][0]
        assert [image for clip, image in asked if clip == query] == list(dict.fromkeys([first, relevant]))
    assert "bright: much" in "".join(root.itertext())


def test_a_clip_without_heat_map_shows_the_reason(evaluate):
    def heat(query, image):
        raise ValueError("the frame is damaged")

    assert "no heat map: the frame is damaged" in html_report(evaluate(heat))


def test_unreadable_pictures_become_tiles(evaluate, shop):
    evaluation = evaluate()
    (shop.folder / "a0.png").write_bytes(b"no image")
    (shop.folder / "a1.png").write_bytes(b"no image")
    (shop.folder / "x" / "x0.png").unlink()
    parse(html_report(evaluation))


def test_results_of_a_model_without_decoder_speed_or_groups(evaluate):
    evaluation = evaluate(by={}, failures=[])
    del evaluation.results["speed"]
    del evaluation.results["protocol"]["fusion"]
    evaluation.results["protocol"]["rank_by"] = "embedding"
    page = html_report(evaluation)
    parse(page)
    assert "Fusion of" not in page and "Recall by attribute" not in page and "<h2>Speed" not in page
    assert "Every clip and image could be read" in page and "R@1 by embedding score" in page


def test_best_and_worst_queries():
    task = RetrievalTask(
        query_ids=["near", "far", "third", "second", "close second", "empty"],
        relevant=dict.fromkeys(["near", "far", "third", "second", "close second", "empty"], ["a"]),
        query_scopes=[""] * 6,
        image_ids=["a", "b", "c"],
        image_rows=[[0], [1], [2]],
        scopes={"": [0, 1, 2]},
        shops=[""] * 6,
    )
    ranked = Rankings(task)
    for number, scores in enumerate([[3, 2.9, 0], [3, 1, 0], [1, 2, 3], [2, 3, 1], [2, 2.1, 1]]):
        ranked.add(number, np.array(scores, dtype=np.float32))
    assert choose_examples(task, ranked.complete()) == ([1, 0], [2, 3, 4])
    assert choose_examples(task, ranked, 1) == ([1], [2])


def test_by_livestream_counts_each_shop(evaluate):
    evaluation = evaluate()
    spread = by_livestream(evaluation.task, evaluation.rankings)
    assert {name: values["num_queries"] for name, values in spread.items()} == {"x": 3, "y": 2}
    for kind, ranked in evaluation.rankings.items():
        total = sum(values["num_queries"] * values[kind]["R@1"] for values in spread.values())
        assert total / 5 == pytest.approx(ranked.recall()["R@1"])


def test_groups_keep_their_interval():
    groups = {
        "a": {"num_queries": 20, "fused": {"R@1": 0.5, "R@1_ci95": [0.3, 0.7]}},
        "c": {"num_queries": 3, "embedding": {"R@1": 0.0}},
    }
    assert group_bars(groups, "fused") == [Bar("a", 0.5, (0.3, 0.7), 20)]


def test_bars_are_as_long_as_their_values():
    svg = ElementTree.fromstring(bar_plot([Bar("a <b>", 0.25, (0.2, 0.3), 8), Bar("c", 1.0)], "title"))
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[0] == pytest.approx(widths[1] / 4)
    assert "25.0 of 8" in ["".join(text.itertext()) for text in svg.iter("text")]


def test_curve_rises_with_its_values_and_marks_the_chosen_weight():
    svg = ElementTree.fromstring(curve_plot(CURVE, 2.0, "title"))
    points = list(svg.iter("circle"))
    assert float(points[0].get("cy")) > float(points[1].get("cy"))
    assert float(points[0].get("cx")) < float(points[1].get("cx"))
    assert [point.get("r") for point in points] == ["3", "6"]
    parse_one = ElementTree.fromstring(curve_plot(CURVE[:1], 0.1, "title"))
    assert len(list(parse_one.iter("circle"))) == 1


def test_time_is_counted_per_image_and_clip(model, collator, shop, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("evaluation_rice.speed.time.perf_counter", lambda: float(next(clock)))
    retriever = TimedRetriever(ModelRetriever(model, collator))
    queries, gallery = shop.queries, shop.gallery
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    retrieve(retriever, task, queries, gallery, loading=Loading(4, 0, quiet=True))
    speed = retriever.summary()
    # Every call lasts one tick: 6 images and 5 clips in 2 batches each, the clips of 2 livestreams apart.
    assert speed["image_ms"] == pytest.approx(2000 / 6) and speed["clip_ms"] == pytest.approx(2000 / 5)
    assert speed["search_ms"] >= 2000 / 5 and speed["device"] == "cpu"
