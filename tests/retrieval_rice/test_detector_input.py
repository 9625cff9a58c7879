"""What the detector's commands refuse: other data, other devices, missing packages, models that are not detectors."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, YolosConfig, YolosForObjectDetection, YolosImageProcessor

import eval_rice
from data_rice.box_files import BoxFile
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer
from retrieval_rice.detector import training
from retrieval_rice.detector.__main__ import main
from retrieval_rice.detector.evaluation import evaluate
from retrieval_rice.detector.frames import load_frames
from retrieval_rice.detector.product_detector import ProductDetector

pytest.importorskip("scipy")
pytest.importorskip("pycocotools")

SHARED = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def make_shop(root, seed):
    """Clips c0 to c3 of two frames, the first with a box, to train, validate and test on."""
    root.mkdir()
    noise = np.random.default_rng(seed)
    Image.new("RGB", (8, 8)).save(root / "mug.png")
    (root / "gallery.jsonl").write_text('{"gallery_id": "mug", "image": "mug.png"}\n')
    for split in ("train", "val", "test"):
        clips = []
        for number in range(4):
            frames = [f"{split}{number}-{i}.png" for i in range(2)]
            for frame in frames:
                Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / frame)
            boxes = [[0, 0, 0.5, 0.5], None]
            clips.append({"query_id": f"c{number}", "frames": frames, "boxes": boxes, "gt_gallery_ids": ["mug"]})
        (root / f"clips_{split}.jsonl").write_text("\n".join(map(json.dumps, clips)))
    return root


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    root = tmp_path_factory.mktemp("shops")
    return [make_shop(root / name, seed) for seed, name in enumerate(("a", "b"))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """An untrained detector of three classes, as published ones are."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    names = {0: "person", 1: "cup", 2: "bag"}
    config = YolosConfig(**SHARED, image_size=[32, 32], patch_size=16, num_detection_tokens=20, id2label=names)
    model = YolosForObjectDetection(config)
    # So that each of the three is some query's best class.
    torch.nn.init.normal_(model.class_labels_classifier.layers[-1].weight, std=50)
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens, std=5)
    model.save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rice(tmp_path_factory):
    """A RICE checkpoint, which names the code that it can be loaded with."""
    folder = tmp_path_factory.mktemp("rice")
    torch.manual_seed(0)
    config = RiceConfig(vision_config=SHARED | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    RiceModel(config).save_pretrained(folder)
    build_processor(train_tokenizer(["a red mug"] * 20), 32, config.mask_patch_size, 2).save_pretrained(folder)
    assert "auto_map" in (folder / "config.json").read_text()
    return str(folder)


@pytest.fixture
def refusal(capsys):
    """A function that runs a command, which must end with status 2, and returns its one sentence."""

    def refusal(*arguments, program=main):
        with pytest.raises(SystemExit) as end:
            program([str(argument) for argument in arguments])
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return refusal


def run_step(shop, cache, detector, output, *more):
    data = ["--dataset", "shop_clips", "--data_dir", shop, "--cache_dir", cache, "--device", "cpu"]
    return [str(a) for a in ["run", *data, "--detector", detector, "--output", output, *more]]


class TestOtherData:
    def test_another_shops_file_is_not_continued(self, shops, cache, detector_dir, tmp_path, refusal, capsys):
        output = tmp_path / "boxes.jsonl"
        main(run_step(shops[0], cache, detector_dir, output))
        before = output.read_bytes()
        main(run_step(shops[0], cache, detector_dir, output))
        assert "0 clips (4 existed already)" in capsys.readouterr().out
        line = refusal(*run_step(shops[1], cache, detector_dir, output))
        assert "of other pictures than those of the clip 'c0' of the test split; name another box file" in line
        assert output.read_bytes() == before

    def test_files_of_earlier_versions_are_continued(self, shops, cache, detector_dir, tmp_path, capsys):
        output = tmp_path / "boxes.jsonl"
        main(run_step(shops[0], cache, detector_dir, output))
        header, *lines = map(json.loads, output.read_text().splitlines())
        del header["labels"]
        for line in lines:
            assert len(line.pop("fingerprint")) == 16
        output.write_text("".join(json.dumps(entry) + "\n" for entry in (header, *lines[:2])))
        capsys.readouterr()
        main(run_step(shops[0], cache, detector_dir, output))
        assert "2 clips (2 existed already)" in capsys.readouterr().out
        assert len(BoxFile(output)) == 4

    def test_eval_rice_refuses_an_output_dir_of_another_shop(
        self, shops, cache, detector_dir, rice, tmp_path, refusal
    ):
        def arguments(shop):
            given = ["--model", rice, "--dataset", "shop_clips", "--data_dir", shop, "--output_dir", tmp_path / "out"]
            given += ["--boxes", "detector", "--detector", detector_dir, "--baselines", "chance", "--fusion_weight", 1]
            return [str(a) for a in [*given, "--cache_dir", cache, "--device", "cpu", "--num_workers", 0]]

        eval_rice.main(arguments(shops[0]))
        line = refusal(*arguments(shops[1]), program=eval_rice.main)
        assert "out/boxes.jsonl has boxes of other pictures than those of the clip 'c0'" in line

    def test_another_detector_of_the_same_folder(self, shops, cache, save_detector, tmp_path, refusal):
        folder = save_detector(tmp_path / "detector")
        main(run_step(shops[0], cache, folder, tmp_path / "boxes.jsonl"))
        save_detector(tmp_path / "detector", seed=1)
        line = refusal(*run_step(shops[0], cache, folder, tmp_path / "boxes.jsonl"))
        assert "was begun with detector_sha256=" in line and "name another file, or remove it" in line


class TestDevices:
    def test_a_device_that_cannot_be_used(self, shops, cache, detector_dir, tmp_path, refusal):
        data = ["--dataset", shops[0], "--cache_dir", cache, "--device", "foo"]
        for step in (["eval"], ["run", "--output", tmp_path / "boxes.jsonl"]):
            line = refusal(*step, *data, "--detector", detector_dir)
            assert f"{step[0]}: error: --device foo cannot be used (" in line
        line = refusal("train", *data, "--output_dir", tmp_path / "out")
        assert "train: error: --device foo cannot be used (" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
    def test_no_gpu(self, shops, cache, detector_dir, tmp_path, refusal):
        data = ["--dataset", shops[0], "--cache_dir", cache, "--device", "cuda"]
        assert "--device cuda cannot be used (" in refusal("eval", *data, "--detector", detector_dir)
        assert "--device cuda cannot be used (" in refusal("train", *data, "--output_dir", tmp_path / "out")

    def test_training_on_another_device_than_the_trainer(self, shops, cache, tmp_path, refusal):
        data = ["--dataset", shops[0], "--cache_dir", cache, "--output_dir", tmp_path / "out"]
        line = refusal("train", *data, "--device", "meta")
        assert "--device meta cannot be used: training runs on " in line and "CUDA_VISIBLE_DEVICES" in line


class TestPackages:
    TRAIN = ("--max_steps", 1, "--batch_size", 2, "--image_size", 32, "--device", "cpu")

    @pytest.mark.parametrize("package, module", [("scipy", "scipy.optimize"), ("pycocotools", "pycocotools.coco")])
    def test_missing_packages_are_named_before_training(
        self, shops, cache, tmp_path, refusal, monkeypatch, package, module
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(training, "load_frames", lambda *args, **kwargs: pytest.fail("began to train"))
        arguments = ["train", "--dataset", shops[0], "--cache_dir", cache, "--output_dir", tmp_path / "out"]
        line = refusal(*arguments, *self.TRAIN)
        assert f"needs {package}; install it: pip install {package}, or -e '.[detector]'." in line

    def test_missing_packages_are_named_before_detection(self, shops, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
        rows = load_frames(str(shops[0]), "test", cache_dir=str(cache))
        with pytest.raises(ValueError, match="needs pycocotools"):
            evaluate(None, rows)

    def test_the_model_is_saved_before_a_failed_validation(self, shops, cache, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("the disk is gone")

        settings = training.DetectorSettings(str(shops[0]), max_steps=1, batch_size=2, image_size=32)
        options = {"cache_dir": str(cache), "device": "cpu"}
        with monkeypatch.context() as patch:
            patch.setattr(training, "evaluate", fail)
            with pytest.raises(OSError, match="the disk is gone"):
                training.train(settings, tmp_path / "out", **options)
        kept = ProductDetector.from_pretrained(str(tmp_path / "out"), "cpu")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        record = training.train(settings, tmp_path / "out", **options)
        finished = ProductDetector.from_pretrained(str(tmp_path / "out"), "cpu")
        assert record["finished"] and finished.threshold == record["validation"]["threshold"]
        for (name, weight), other in zip(kept.model.named_parameters(), finished.model.parameters()):
            torch.testing.assert_close(weight, other, msg=name)
        own = {"score_threshold": finished.threshold}
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | own


class TestOtherModels:
    def test_models_that_are_not_detectors(self, shops, cache, rice, tmp_path, refusal, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked for leave to run code"))
        config = CLIPConfig(text_config=SHARED | {"vocab_size": 30}, vision_config=SHARED | {"image_size": 32})
        CLIPModel(config).save_pretrained(tmp_path / "clip")
        data = ["--dataset", shops[0], "--cache_dir", cache, "--device", "cpu"]
        for path, kind in ((rice, "rice"), (tmp_path / "clip", "clip")):
            for step in (["eval", "--detector", path], ["train", "--model", path, "--output_dir", tmp_path / "out"]):
                line = refusal(*step, *data)
                assert line.endswith(
                    f"{path} holds a {kind} model, not a detector: name a folder that python -m "
                    "retrieval_rice.detector train wrote, or an object detection model of transformers."
                )

    def test_threshold(self, shops, cache, detector_dir, refusal):
        for value in ("nan", "1.5", "-0.1"):
            line = refusal("eval", "--dataset", shops[0], "--detector", detector_dir, f"--threshold={value}")
            assert line.endswith(f"the threshold must be between 0 and 1, got {value}.")


class TestLabels:
    def test_a_detector_of_several_classes_needs_labels(self, yolos, shops, cache, refusal):
        line = refusal("eval", "--dataset", shops[0], "--detector", yolos, "--device", "cpu")
        assert f"{yolos} has 3 classes (person, cup, bag), so its best box may not show the product" in line
        assert f"fine-tune it (python -m retrieval_rice.detector train --model {yolos})" in line
        line = refusal(
            "eval", "--dataset", shops[0], "--detector", yolos, "--device", "cpu", "--labels", "cup", "mugg"
        )
        assert "has no class 'mugg' (--labels): it has 3 classes (person, cup, bag)." in line

    def test_only_boxes_of_these_classes_are_kept(self, yolos):
        frames = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))]
        names = ["person", "cup", "bag"]
        every = ProductDetector.from_pretrained(yolos, "cpu", labels=names).predict(frames)[0]
        found = {
            name: ProductDetector.from_pretrained(yolos, "cpu", labels=[name]).predict(frames)[0] for name in names
        }
        sizes = {name: len(entry.scores) for name, entry in found.items()}
        assert sum(sizes.values()) == len(every.scores) == 20 and sorted(sizes.values())[1] > 0
        together = torch.cat([entry.scores for entry in found.values()]).sort(descending=True).values
        torch.testing.assert_close(together, every.scores)
        cups = ProductDetector.from_pretrained(yolos, "cpu", labels=["cup", "bag"]).predict(frames)[0]
        assert len(cups.scores) == sizes["cup"] + sizes["bag"] and (cups.scores[:-1] >= cups.scores[1:]).all()

    def test_a_box_file_is_of_its_labels(self, yolos, shops, cache, tmp_path, refusal):
        output = tmp_path / "boxes.jsonl"
        main(run_step(shops[0], cache, yolos, output, "--threshold", 0, "--labels", "cup", "bag"))
        assert BoxFile(output).header["labels"] == ["bag", "cup"]
        line = refusal(*run_step(shops[0], cache, yolos, output, "--threshold", 0, "--labels", "cup"))
        assert "was begun with labels=['bag', 'cup'], not ['cup']" in line
        main(run_step(shops[0], cache, yolos, output, "--threshold", 0, "--labels", "bag", "cup"))

    def test_one_class_needs_none(self, detector_dir):
        detector = ProductDetector.from_pretrained(detector_dir, "cpu")
        assert detector.labels is None
        frames = [Image.new("RGB", (40, 32))]
        named = ProductDetector.from_pretrained(detector_dir, "cpu", labels=["product"])
        assert named.detect(frames) == detector.detect(frames) != [None]
