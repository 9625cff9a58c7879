import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from retrieval_rice.demo.command import load_demo
from retrieval_rice.demo.space import REQUIREMENTS
from rice_cli import build_parser, main

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def shop_folder(demo, tmp_path):
    """The demo's shop, clips and model on disk; returns the folder of the shop and that of the model."""
    root = tmp_path / "pictures"
    for row in demo.queries:
        for i, frame in enumerate(row["frames"]):
            (root / f"{row['clip_id']}-{i}.png").write_bytes(frame["bytes"])
    gallery = [
        {"gallery_id": row["image_id"], "image": f"{row['image_id']}.png", **{k: row[k] for k in ("title", "live_id")}}
        for row in demo.gallery
    ]
    clips = [
        {
            "query_id": row["clip_id"],
            "frames": [f"{row['clip_id']}-{i}.png" for i in range(2)],
            "boxes": row["boxes"],
            "gt_gallery_ids": row["relevant"],
            **{k: row[k] for k in ("asr", "live_id")},
        }
        for row in demo.queries
    ]
    for name, lines in (("gallery.jsonl", gallery), ("clips_test.jsonl", clips)):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    demo.model.save_pretrained(tmp_path / "model")
    demo.processor.save_pretrained(tmp_path / "model")
    return root, tmp_path / "model"


def options(*arguments):
    return build_parser().parse_args(["demo", "--device", "cpu", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main(["demo", *map(str, arguments)])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_data_set_gives_examples_and_shop(shop_folder):
    shop, model = shop_folder
    demo = load_demo(options("--model", model, "--dataset", shop))
    recognition = demo.recognise(demo.example("y", 1), "y")
    assert recognition.answer.hits[0].image_id == "p3" and recognition.clip.row["relevant"] == ["p3"]
    assert demo.frames(recognition)[0].size == (240, 240) and demo.boxes == ["none", "true"]
    assert demo.pair(recognition, 0).title == "title 3"


def test_an_index_is_searched_without_rebuilding(shop_folder, demo, tmp_path):
    shop, model = shop_folder
    demo.index.save(tmp_path / "index")
    loaded = load_demo(options("--model", model, "--shop", tmp_path / "index", "--dataset", shop))
    assert loaded.gallery is None and loaded.shops == ["x", "y", ""]
    assert loaded.recognise(loaded.example("x", 2), "x").answer.hits[0].image_id == "p4"


def test_a_detector_is_loaded_and_asked(shop_folder, tmp_path):
    from retrieval_rice.detector.product_detector import build_detector

    shop, model = shop_folder
    for part in build_detector():
        part.save_pretrained(tmp_path / "detector")
    demo = load_demo(options("--model", model, "--dataset", shop, "--detector", tmp_path / "detector"))
    assert demo.boxes == ["none", "true", "detector"]
    demo.detector.threshold = 0.0
    recognition = demo.recognise(demo.example("y", 1), "y", boxes="detector")
    frames = [Image.open(shop / f"clip 3-{i}.png") for i in range(2)]
    assert recognition.row["boxes"] == demo.detector.detect(frames) and any(recognition.row["boxes"])


def test_a_folder_of_pictures_is_a_shop_without_examples(shop_folder, tmp_path, save_frames):
    (tmp_path / "plain").mkdir()
    for number in (1, 2):
        Image.open(shop_folder[0] / f"p{number}.png").save(tmp_path / "plain" / f"product_{number}.png")
    demo = load_demo(options("--model", shop_folder[1], "--shop", tmp_path / "plain"))
    assert demo.queries is None and demo.shops == [""] and demo.example_pictures("") == []
    demo.folder = str(tmp_path / "uploads")
    hits = demo.recognise(demo.upload(save_frames(2)), "").answer.hits
    assert [hit.title for hit in hits] == ["product 2", "product 1"]


def test_mistakes_are_reported_in_one_sentence(shop_folder, tmp_path, capsys, monkeypatch):
    shop, model = shop_folder
    assert "no_model" in refusal(capsys, "--model", tmp_path / "no_model", "--dataset", shop)
    assert "no_detector" in refusal(
        capsys, "--model", model, "--dataset", shop, "--detector", tmp_path / "no_detector"
    )
    assert "nowhere" in refusal(capsys, "--model", model, "--shop", tmp_path / "nowhere")
    assert "from 1 to 65535" in refusal(capsys, "--model", model, "--port", 0)
    words = refusal(capsys, "--model", model, "--dataset", shop, "--space", shop)
    assert words.endswith("already exists; name a new or empty folder for the Space.")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "retrieval_rice.demo.app", raising=False)
    assert "pip install gradio" in refusal(capsys, "--model", model, "--dataset", shop)


def test_requirements_of_a_space_are_those_of_the_project():
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    required = settings["options"]["install_requires"].split()
    extra = settings["options.extras_require"]["demo"].split()
    assert set(REQUIREMENTS) == {*required, *extra} - {"gradio"}


def test_a_space_includes_its_detector(shop_folder, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio")
    shop, model = shop_folder
    arguments = ["demo", "--model", model, "--dataset", shop, "--space_examples", 1]
    # Files are copied as they are, so another checkpoint stands for a detector's.
    assert main([*map(str, arguments), "--space", str(tmp_path / "space"), "--detector", str(model)]) == 0
    assert (tmp_path / "space" / "detector" / "config.json").is_file()
    assert '"--detector", "detector"]' in (tmp_path / "space" / "app.py").read_text()


def test_a_space_runs_without_the_project(shop_folder, tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs gradio")
    shop, model = shop_folder
    space = tmp_path / "space"
    arguments = ["--model", model, "--dataset", shop, "--space", space, "--space_examples", 4]
    assert main(["demo", *map(str, arguments)]) == 0
    assert "4 example clips and 10 pictures of 2 shops" in capsys.readouterr().out
    assert "sdk: gradio" in (space / "README.md").read_text()
    assert {path.name for path in space.iterdir()} >= {"app.py", "requirements.txt", "model", "shop", "retrieval_rice"}
    assert not list((space / "model").glob("*.bin"))
    # As the app does it, in a process that knows no other folder, but without the server.
    code = (
        "import retrieval_rice, os; from rice_cli import build_parser; "
        "from retrieval_rice.demo.command import load_demo; import app; "
        "assert os.path.dirname(retrieval_rice.__path__[0]) == os.getcwd(); "
        "demo = load_demo(build_parser().parse_args(['demo', '--model', 'model', '--dataset', 'shop'])); "
        "r = demo.recognise(demo.example('x', 1), 'x'); "
        "print(r.clip.row['relevant'], [hit.image_id for hit in r.answer.hits][0], len(demo.example_numbers('x')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(space)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    relevant, first, count = result.stdout.strip().splitlines()[-1].rsplit(" ", 2)
    assert relevant == f"['{first}']" and count == "2"
