import importlib.util
import json

import pytest
import torch
from PIL import Image

import eval_rice
from evaluation_rice.study import table

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "yellow": (230, 220, 20)}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def shop(tmp_path):
    """A shop_clips folder with four products, four test clips, and training clips of categories r, g, g, b."""
    root = tmp_path / "shop"
    (root / "images").mkdir(parents=True)
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(root / "images" / f"{name}.png")
        rows.append({"gallery_id": name, "image": f"images/{name}.png", "title": name})
    write_lines(root / "gallery.jsonl", rows)
    for split, names in (("test", list(COLOURS)), ("train", ["red", "green", "green", "blue"])):
        clips = []
        for i, name in enumerate(names):
            frame = f"images/{split}-{i}.png"
            Image.new("RGB", (48, 32), tuple(max(0, value - 15) for value in COLOURS[name])).save(root / frame)
            clips.append(
                {"query_id": f"{split}-{i}", "frames": [frame], "gt_gallery_ids": [name], "category": name[0]}
            )
        write_lines(root / f"clips_{split}.jsonl", clips)
    return root


@pytest.fixture
def swin(tmp_path):
    import transformers as t

    torch.manual_seed(0)
    config = t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    t.SwinModel(config).save_pretrained(tmp_path / "tiny_swin")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny_swin")
    return tmp_path / "tiny_swin"


def run(shop, output, *arguments):
    more = ["--dataset", shop, "--output_dir", output, "--num_workers", 0, "--device", "cpu"]
    eval_rice.main([str(argument) for argument in [*arguments, *more]])
    return json.loads((output / "results.json").read_text())


def refusal(capsys, shop, output, *arguments):
    with pytest.raises(SystemExit) as end:
        run(shop, output, *arguments)
    assert end.value.code == 2 and not (output / "results.json").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_descriptor_writes_the_same_files_as_a_model(shop, tmp_path, capsys):
    results = run(shop, tmp_path / "out", "--baseline", "color_histogram")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"README.md", "breakdown.png", "matches.png", "query_ranks.jsonl", "rankings.jsonl", "results.json"}
    assert files == wanted if importlib.util.find_spec("matplotlib") else wanted - {"breakdown.png"}
    assert results["baseline"] == {"name": "color_histogram", "model": None} and results["parameters"] == 0
    assert set(results["scores"]) == {"embedding"} and set(results["baselines"]) == {"chance"}
    assert results["speed"]["clip_ms"] > 0 and results["speed"]["image_ms"] > 0
    assert results["protocol"]["num_frames"] == 10 and results["protocol"]["rank_by"] == "embedding"
    assert "# Baseline color_histogram" in (tmp_path / "out" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "colour histogram" in printed and "RICE" not in printed


def test_its_figures_equal_those_beside_a_model(shop, tmp_path):
    alone = run(shop, tmp_path / "a", "--baseline", "color_histogram")["scores"]["embedding"]
    beside = run(shop, tmp_path / "b", "--baseline", "pixels_8x8")["baselines"]["color_histogram"]
    assert alone == beside


def test_any_folder_is_a_baseline(shop, swin, tmp_path):
    results = run(shop, tmp_path / "a", "--baseline", swin)
    assert results["baseline"] == {"name": "swin", "model": str(swin)} and results["parameters"] > 0
    again = run(shop, tmp_path / "b", "--baseline", "swin", "--baseline_model", swin, "--batch_size", 1)
    assert again["scores"] == results["scores"] and again["baseline"] == results["baseline"]


def test_head_and_tail_follow_the_training_rows(shop, tmp_path):
    """Of 4 rows, g has 2, which is half: r and b are the tail, y was never seen."""
    results = run(shop, tmp_path / "out", "--baseline", "color_histogram")
    groups = results["by"]["head_tail"]
    assert {name: group["num_queries"] for name, group in groups.items()} == {
        "head": 1, "tail": 2, "not in training": 1
    }  # fmt: skip
    assert results["head_tail"]["head"] == ["g"] and results["head_tail"]["train_rows"] == 4
    assert len(groups["tail"]["embedding"]["R@1_ci95"]) == 2


def test_without_training_rows_or_matplotlib_it_says_so(shop, tmp_path, capsys, monkeypatch):
    (shop / "clips_train.jsonl").unlink()
    monkeypatch.setattr("evaluation_rice.breakdown.find_spec", lambda name: None)
    results = run(shop, tmp_path / "out", "--baseline", "color_histogram")
    printed = capsys.readouterr().out
    assert "head_tail" not in results["by"] and "cannot be counted" in results["head_tail"]["missing"]
    assert "no breakdown by head and tail" in printed and "no breakdown.png: matplotlib" in printed
    assert not (tmp_path / "out" / "breakdown.png").exists()


def test_one_table_holds_them_all(shop, swin, tmp_path):
    run(shop, tmp_path / "histogram", "--baseline", "color_histogram")
    run(shop, tmp_path / "swin", "--baseline", swin)
    entries = [table.read_entry(str(tmp_path / name)) for name in ("histogram", "swin")]
    text = table.markdown([*entries, table.read_entry(f"later={tmp_path / 'later'}")])
    assert "| swin (tiny_swin), frozen | embedding |" in text and "| later | not run |" in text
    assert "| clip (openai/clip-vit-base-patch32), frozen | not run |" in text
    assert text.count("| colour histogram | embedding |") == 1 and "| chance |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "magic"], "there is no baseline 'magic'"),
        (["--baseline", "chance"], "chance is computed"),
        (["--baseline", "clip"], "HF_HUB_OFFLINE"),
        (["--baseline", "color_histogram", "--rank_by", "fused"], "needs a matching decoder"),
        (["--baseline", "color_histogram", "--fusion_weight", "2"], "--fusion_weight goes with --model"),
        (["--baseline", "color_histogram_in_box"], "add --boxes ground_truth"),
        (["--model", "somewhere", "--baseline_model", "me/mine"], "--baseline_model goes with --baseline"),
        (["--model", "somewhere", "--baseline", "clip"], "not allowed with argument"),
        ([], "one of the arguments --model --baseline is required"),
    ],
)
def test_mistakes(shop, tmp_path, capsys, arguments, words):
    assert words in refusal(capsys, shop, tmp_path / "out", *arguments)
