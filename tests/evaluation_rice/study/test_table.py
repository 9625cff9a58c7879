import json
import re
from pathlib import Path

import pytest

from evaluation_rice.recall import bootstrap_interval
from evaluation_rice.study import table

PROTOCOL = {
    "split": "test", "gallery_scope": "live", "gallery_images": "main", "num_galleries": 2, "num_gallery_images": 7,
    "boxes": "none", "num_frames": 5, "task_sha256": "abc",
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def save(name, hits=(1, 0, 0, 1), baseline=None, dataset="mini_lpr4m", speed=True, lives=None, **protocol):
        share = sum(hits) / len(hits)
        results = {
            "protocol": {**PROTOCOL, **protocol},
            "num_queries": len(hits),
            "gallery_size": {"min": 3, "median": 3.5, "max": 4},
            "scores": {"embedding": {"R@1": share, "R@5": 1.0, "R@1_ci95": [0.1, 0.9]}},
            "baselines": {"chance": {"R@1": 0.25, "R@5": 1.0}},
            "baseline": baseline,
            "dataset": dataset,
            "parameters": 1_234_567,
        }
        if speed:
            results["speed"] = {"clip_ms": 12.0, "image_ms": 3.456, "device": "cpu", "threads": 2}
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        rows = [{"query_id": f"q{i}", "embedding": 1 if hit else None} for i, hit in enumerate(hits)]
        rows = [row | {"live_id": live} for row, live in zip(rows, lives, strict=True)] if lives else rows
        (folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return save


def cells(text, title):
    """The cells of a row by the names of the columns."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    row = next(line for line in lines if line[0].strip() == title)
    return dict(zip([name.strip() for name in lines[0]], [cell.strip() for cell in row], strict=False))


def test_a_row_shows_recall_and_costs(write):
    text = table.markdown([table.read_entry(write("demo"))])
    row = cells(text, "RICE (demo)")
    assert row["R@1"] == "50.0" and row["95 % of R@1"] == "10.0 to 90.0" and row["R@5"] == "100.0"
    assert row["parameters"] == "1.2 M" and row["ms per clip"] == "12" and row["ms per image"] == "3.46"
    assert row["boxes"] == "none" and row["frames"] == "5"
    assert "cpu with 2 threads." in text and "2 galleries of 3 to 4 images" in text
    assert cells(text, "chance")["R@1"] == "25.0"


def test_seeds_of_an_arm_are_one_row_with_an_interval_over_queries(write, tmp_path):
    write("arm/seed0/eval", (1, 1, 0, 0))
    write("arm/seed1/eval", (1, 0, 0, 0))
    row = cells(table.markdown([table.read_entry(f"SEAM-style={tmp_path / 'arm'}")]), "SEAM-style")
    low, high = bootstrap_interval([1, 0.5, 0, 0])
    assert row["R@1"] == "37.5" and row["95 % of R@1"] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert row["seeds"] == "2"


def test_the_interval_resamples_shops_and_says_so(write, tmp_path):
    """Shop "a" has all hits and shop "b" none."""
    for arm, lives in (("new", "aabb"), ("old", None)):
        write(f"{arm}/seed0/eval", (1, 1, 0, 0), lives=lives)
        write(f"{arm}/seed1/eval", (1, 1, 0, 0), lives=lives)
    text = table.markdown([table.read_entry(f"new={tmp_path / 'new'}")])
    assert cells(text, "new")["95 % of R@1"] == "0.0 to 100.0"
    assert text.count("Interval: ") == 1 and "Interval: percentile bootstrap over 2 shops, then over the" in text
    both = table.markdown([table.read_entry(f"{arm}={tmp_path / arm}") for arm in ("new", "old")])
    assert "over 2 shops" in both and "as if they were independent, since the files name no shops" in both
    single = table.read_entry(write("one", interval="percentile bootstrap over queries"))
    assert "Interval: percentile bootstrap over queries." in table.markdown([single])


def test_a_score_that_some_seeds_lack_is_the_mean_of_the_others(write, tmp_path):
    for seed, hits in enumerate([(1, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 0)]):
        folder = Path(write(f"arm/seed{seed}/eval", hits))
        if seed < 2:
            results = json.loads((folder / "results.json").read_text())
            results["scores"]["matching"] = {"R@1": sum(hits) / 4, "R@1_ci95": [0.0, 1.0]}
            (folder / "results.json").write_text(json.dumps(results))
            ranks = [json.loads(line) for line in (folder / "query_ranks.jsonl").read_text().splitlines()]
            rows = [{**row, "matching": row["embedding"]} for row in ranks]
            (folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table.markdown([table.read_entry(f"arm={tmp_path / 'arm'}")])
    embedding, matching = (line for line in text.splitlines() if line.startswith("| arm |"))
    assert embedding.startswith("| arm | embedding | 50.0 |") and embedding.rstrip("| ").endswith("| 3")
    # Its seeds have no R@5 of it either.
    assert matching.startswith("| arm | matching | 37.5 |") and matching.rstrip("| ").endswith("| 2 of 3")
    assert "|  | none | 5 |" in matching


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "validation"}, "split is 'test' and 'validation'"),
        ({"gallery_scope": "all"}, "gallery_scope is 'live' and 'all'"),
        ({"gallery_images": "all"}, "gallery_images is 'main' and 'all'"),
        ({"dataset": "shop_clips"}, "dataset is 'mini_lpr4m' and 'shop_clips'"),
        ({"hits": (1, 0)}, "num_queries is 4 and 2"),
        ({"task_sha256": "another rendering"}, "task_sha256 is 'abc'"),
    ],
)
def test_different_protocols_are_refused(write, change, words):
    entries = [table.read_entry(write("one")), table.read_entry(write("two", **change))]
    with pytest.raises(ValueError, match=f"one and .*two have different protocols: {words}"):
        table.markdown(entries)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "query_ranks.jsonl is missing: run eval_rice.py again."),
        ('{"query_id": "a", "embedding": 1', "query_ranks.jsonl, line 1: not valid JSON .*: run eval_rice.py again."),
        ('{"embedding": 1}', "query_ranks.jsonl, line 1: no query_id: run eval_rice.py again."),
        ('{"query_id": "q0", "matching": 1}', "lacks 'embedding' scores of some clips; it has matching: name one."),
        ('{"query_id": "q0", "embedding": 1}', "query_ranks.jsonl has other clips than"),
    ],
)
def test_hits_that_cannot_be_read_are_named(write, tmp_path, capsys, content, words):
    write("arm/seed0/eval")
    path = tmp_path / "arm/seed1/eval/query_ranks.jsonl"
    write("arm/seed1/eval")
    path.write_text(content) if content else path.unlink()
    with pytest.raises(SystemExit) as stop:
        table.main([str(tmp_path / "arm")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "seed1" in message and message.count("\n") == 1 and re.search(words, message)


def test_boxes_and_frames_may_differ_and_are_shown(write):
    entries = [table.read_entry(write("one")), table.read_entry(write("two", boxes="detector", num_frames=10))]
    text = table.markdown(entries)
    assert (cells(text, "RICE (one)")["boxes"], cells(text, "RICE (two)")["boxes"]) == ("none", "detector")
    assert cells(text, "RICE (two)")["frames"] == "10"


def test_the_asr_column_is_shown_if_a_result_changed_the_asr(write):
    one, two = (table.read_entry(write(name, asr="own")) for name in ("one", "two"))
    assert "ASR" not in cells(table.markdown([one, two]), "RICE (one)")
    text = table.markdown([one, table.read_entry(write("wrong", asr="wrong")), table.read_entry(write("unread"))])
    shown = [cells(text, f"RICE ({name})").get("ASR", "") for name in ("one", "wrong", "unread")]
    assert shown == ["own", "wrong", ""]


def test_published_models_without_a_result_are_listed_as_not_run(write):
    clip = {"name": "clip", "model": "openai/clip-vit-base-patch32"}
    before = table.markdown([table.read_entry(write("demo"))])
    assert "| clip (openai/clip-vit-base-patch32), frozen | not run |" in before
    after = table.markdown([table.read_entry(write("clip", baseline=clip))])
    assert cells(after, "clip (openai/clip-vit-base-patch32), frozen")["score"] == "embedding"
    assert "| swin (microsoft/swin-tiny-patch4-window7-224), frozen | not run |" in after
    assert "not run" not in table.markdown([table.read_entry(write("other"))], list_missing=False)


def test_results_without_times_leave_the_cells_empty(write):
    text = table.markdown([table.read_entry(write("old", speed=False))])
    assert cells(text, "RICE (old)")["ms per clip"] == "" and "Times:" not in text


def test_the_command_writes_the_table_and_reports_mistakes(write, tmp_path, capsys):
    folder = write("demo")
    table.main([folder, f"Next={tmp_path / 'next'}", "--output", str(tmp_path / "tables" / "all.md"), "--only_run"])
    assert (tmp_path / "tables" / "all.md").read_text().strip() == capsys.readouterr().out.strip()
    assert "| Next | not run |" in (tmp_path / "tables" / "all.md").read_text()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.json").write_text('{"protocol": {')
    for arguments, words in (
        ([str(tmp_path / "gone")], "has no results.json"),
        ([str(tmp_path / "cut")], "not a complete results file"),
        ([f"Later={tmp_path / 'gone'}"], "there is no result yet"),
        ([folder, "--output", str(tmp_path)], f"--output {tmp_path} is a folder: name a file in it."),
        ([folder, "--output", f"{folder}/results.json/a/b.md"], f"{folder}/results.json is a file: name another"),
    ):
        with pytest.raises(SystemExit) as stop:
            table.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
