import json

import numpy as np
import pytest
from PIL import Image

from evaluation_rice.protocol import Rankings, RetrievalTask
from evaluation_rice.report.matches import choose_rows, draw_matches
from evaluation_rice.report.results import write_rankings, write_results
from hub_rice.tables import format_table, markdown_table

SCORES = {
    "embedding": {"R@1": 0.5, "R@5": 0.75, "R@1_ci95": [0.25, 0.6125]},
    "chance": {"R@1": 0.02, "R@5": 0.1},
}


@pytest.fixture
def ranked(shop):
    """Two hits, two misses of which one lies beyond the first five, and one clip without a ranking."""
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "all")
    ranked = Rankings(task)
    for query, rank in enumerate((0, 0, 2, 5)):
        scores = np.linspace(1, 0, 6)
        relevant = task.relevant_positions(query)[0]
        scores[[relevant, rank]] = scores[[rank, relevant]]
        ranked.add(query, scores)
    return ranked.complete()


def test_table_shows_percent_and_interval():
    lines = format_table(SCORES).splitlines()
    assert lines[0].split() == ["method", "R@1", "R@5", "95", "%", "of", "R@1"]
    assert lines[2].split() == ["RICE,", "embedding", "50.0", "75.0", "25.0", "to", "61.3"]
    assert lines[3].split() == ["chance", "2.0", "10.0"]
    assert markdown_table(SCORES).splitlines()[3] == "| chance | 2.0 | 10.0 |  |"


def test_rankings_file_has_every_query_in_file_order(ranked, tmp_path):
    write_rankings(tmp_path, ranked.task, ranked)
    lines = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [line["query_id"] for line in lines] == list("abcde")
    assert lines[0]["ranking"][0] == "x0" and lines[0]["relevant"] == ["x0"]
    assert lines[4]["ranking"] == []


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_results(tmp_path, {"R@1": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_rows_are_evenly_spaced_hits_and_misses():
    assert choose_rows(list(range(0, 100)), list(range(100, 200)), 4) == ([25, 75], [125, 175])
    assert choose_rows([1], list(range(100, 200)), 4) == ([1], [116, 150, 183])
    assert choose_rows([1, 2], [], 10) == ([1, 2], [])
    assert choose_rows([], [], 10) == ([], [])


def test_matches_frame_the_right_image_green_and_a_wrong_first_red(ranked, shop, tmp_path):
    (shop.folder / "c0.png").unlink()
    for name in ("one.png", "two.png"):
        draw_matches(tmp_path / name, ranked.task, ranked, shop.queries, shop.gallery, "fused")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "one.png"))
    green, red = [(pixels == colour).all(-1) for colour in ((22, 150, 60), (205, 40, 40))]
    height = (len(pixels) - 58) // 5

    def frames(mask):
        return [int(mask[58 + i * height : 58 + (i + 1) * height].sum()) > 1000 for i in range(5)]

    assert frames(green) == [True, True, True, True, True]
    assert frames(red) == [False, False, True, True, False]
