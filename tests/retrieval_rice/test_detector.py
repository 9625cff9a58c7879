"""The intended product detector: training, figures, box files, and evaluation with its boxes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import eval_rice
from data_rice import load_dataset_view
from data_rice.box_files import BoxFile
from data_rice.mini_lpr4m import render_mini_lpr4m
from evaluation_rice.retrieval import ModelRetriever
from hub_rice.results import read_results
from modeling_rice import RiceConfig, RiceModel
from processing_rice import build_processor, train_tokenizer
from retrieval_rice.detector import evaluation, frames, training
from retrieval_rice.detector.__main__ import main
from retrieval_rice.detector.box_writing import write_boxes
from retrieval_rice.detector.evaluation import average_precision, best_threshold, evaluate
from retrieval_rice.detector.frames import DetectionCollator, load_frames
from retrieval_rice.detector.product_detector import Detections, ProductDetector, build_detector
from retrieval_rice.detector.training import DetectorSettings, train

SIZES = {"train": 6, "val": 3, "test": 3}
pytest.importorskip("scipy")


class RedFinder:
    """A detector that cannot err: the box around what is red, with how much of the frame that is as its score."""

    threshold = 0.01
    labels = None

    def __init__(self):
        self.looked_at = 0

    def predict(self, frames):
        self.looked_at += len(frames)
        return [self._find(np.asarray(frame).astype(int)) for frame in frames]

    @staticmethod
    def _find(pixels):
        rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 100))
        if len(rows) == 0:
            return Detections(torch.zeros(0, 4), torch.zeros(0))
        height, width = pixels.shape[:2]
        box = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        return Detections(torch.tensor([box], dtype=torch.float32), torch.tensor([len(rows) / (height * width)]))


def draw(path, box, noise):
    """A grey picture of 40 x 32 pixels with a red rectangle in it, and none for no box."""
    picture = Image.fromarray(noise.integers(90, 130, (32, 40, 3), dtype=np.uint8))
    if box is not None:
        left, top, right, bottom = (round(value * side) for value, side in zip(box, (40, 32, 40, 32)))
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill=(250, 20, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Clips of two frames with a red product, the second of every other clip without it."""
    root, noise = tmp_path_factory.mktemp("data") / "shop", np.random.default_rng(0)
    draw(root / "mug.png", [0, 0, 1, 1], noise)
    draw(root / "cup.png", None, noise)
    gallery = [{"gallery_id": name, "image": f"{name}.png"} for name in ("mug", "cup")]
    (root / "gallery.jsonl").write_text("\n".join(map(json.dumps, gallery)))
    for split, count in SIZES.items():
        clips = []
        for number in range(count):
            left, top = noise.integers(0, 20) / 40, noise.integers(0, 16) / 32
            box = [left, top, left + 0.5, top + 0.5]
            boxes = [box, box if number % 2 else None]
            frames = [f"frames/{split}-{number}-{i}.png" for i in range(2)]
            for frame, place in zip(frames, boxes):
                draw(root / frame, place, noise)
            clips.append({"query_id": f"{number}", "frames": frames, "boxes": boxes, "gt_gallery_ids": ["mug"]})
        (root / f"clips_{split}.jsonl").write_text("\n".join(map(json.dumps, clips)))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


class TestProductDetector:
    def test_a_batch_gives_the_answers_of_single_frames(self, detector_dir):
        detector = ProductDetector.from_pretrained(detector_dir, "cpu")
        frames = [Image.new("RGB", size, (i, 0, 0)) for i, size in enumerate([(40, 32), (20, 20), (40, 32), (20, 20)])]
        together = detector.predict(frames, batch_size=2)
        for frame, found in zip(frames, together):
            alone = detector.predict([frame])[0]
            torch.testing.assert_close(found.boxes, alone.boxes)
            torch.testing.assert_close(found.scores, alone.scores)
            assert (found.scores[:-1] >= found.scores[1:]).all()
        boxes = detector.detect(frames)
        for box in boxes:
            assert box is None or (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
        assert any(box is not None for box in boxes)
        assert detector.detect([]) == []

    def test_threshold(self, detector_dir):
        frames = [Image.new("RGB", (40, 32))]
        assert ProductDetector.from_pretrained(detector_dir, "cpu").threshold == 0.0
        assert ProductDetector.from_pretrained(detector_dir, "cpu", threshold=1.0).detect(frames) == [None]

    def test_best_is_cut_at_the_border(self):
        found = Detections(torch.tensor([[-0.5, 0.25, 0.5, 1.5]]), torch.tensor([0.75]))
        assert found.best(0.7) == ([0, 0.25, 0.5, 1], 0.75)
        assert found.best(0.8) is None
        assert Detections(torch.tensor([[1.5, 0.0, 2.0, 1.0]]), torch.tensor([0.75])).best(0.5) is None

    def test_refusals(self, tmp_path, detector_dir):
        with pytest.raises(FileNotFoundError, match="/none: train one with python -m retrieval_rice.detector train"):
            ProductDetector.from_pretrained(str(tmp_path / "none"))
        with pytest.raises(ValueError, match="image_size must be a multiple of 32, got 33"):
            build_detector(33)


class TestFrames:
    def test_frames_with_and_without_the_product(self, shop, cache):
        rows = load_frames(shop, "train", cache_dir=cache)
        empty = [frame_id for frame_id, boxes in zip(rows["frame_id"], rows["boxes"]) if not boxes]
        assert len(rows) == 12 and sorted(empty) == ["0-0001", "2-0001", "4-0001"]

    def test_augmented_boxes_follow_the_product(self, shop, cache):
        """The red rectangle is where the training target says, whatever was done to the frame."""
        _, processor = build_detector(64)
        torch.manual_seed(0)
        rows = load_frames(shop, "train", cache_dir=cache)
        for batch in (DetectionCollator(processor)(list(rows)) for _ in range(3)):
            assert batch["pixel_values"].shape == (12, 3, 64, 64)
            for pixels, target in zip(batch["pixel_values"], batch["labels"]):
                red = (pixels[0] - pixels[1] > 0.35).nonzero()
                assert (len(target["boxes"]) == 1) == (len(red) > 30) or len(red) < 60
                if len(target["boxes"]) and len(red):
                    x, y, width, height = (64 * target["boxes"][0]).tolist()
                    (top, left), (bottom, right) = red.min(dim=0).values.tolist(), red.max(dim=0).values.tolist()
                    found = [left, top, right + 1, bottom + 1]
                    assert found == pytest.approx(
                        [x - width / 2, y - height / 2, x + width / 2, y + height / 2], abs=4
                    )

    def test_unreadable_frames_are_left_out_and_listed(self, shop, cache, tmp_path):
        _, processor = build_detector(32)
        rows = list(load_frames(shop, "train", cache_dir=cache))[:2]
        rows[0] = rows[0] | {"image": {"path": str(tmp_path / "none.jpg"), "bytes": None}}
        log = tmp_path / "unreadable.jsonl"
        batch = DetectionCollator(processor, str(log))(rows)
        assert len(batch["pixel_values"]) == len(batch["labels"]) == 1
        assert json.loads(log.read_text())["id"] == rows[0]["frame_id"]
        with pytest.raises(ValueError, match="None of the 1 frames of a batch could be read"):
            DetectionCollator(processor, str(log))(rows[:1])


class TestFigures:
    def test_average_precision_by_hand(self):
        """Two frames with one box each: found best first; then a wrong one before the second right one."""
        pytest.importorskip("pycocotools")
        boxes = [[[0, 0, 0.5, 0.5]], [[0.5, 0.5, 1, 1]], []]
        right = [Detections(torch.tensor(entry).reshape(-1, 4), torch.tensor([0.9] * len(entry))) for entry in boxes]
        assert average_precision(boxes, right) == pytest.approx((1, 1))
        right[2] = Detections(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.95]))
        # The false alarm comes first: precision 1/2 and then 2/3, of which the best to come counts, at all recalls.
        assert average_precision(boxes, right)[1] == pytest.approx(2 / 3, abs=1e-6)
        # An IoU of 0.64 passes three of the ten thresholds from 0.50 to 0.95.
        loose = [Detections(torch.tensor([[0, 0, 0.8, 0.8]]), torch.tensor([0.9]))]
        assert average_precision([[[0, 0, 1, 1]]], loose) == pytest.approx((0.3, 1))
        assert average_precision([[[0, 0, 1, 1]]], [Detections(torch.zeros(0, 4), torch.zeros(0))]) == (0, 0)

    def test_threshold_of_the_best_f1(self):
        answer = evaluation._Answer
        answers = [answer(True, 0.9, 0.8), answer(True, 0.7, 0.6), answer(False, 0.6, 0.0), answer(True, 0.5, 0.1)]
        # F1 of the first one, two, three and four answers: 2/4, 4/5, 4/6, 4/7.
        assert best_threshold(answers) == 0.7
        assert best_threshold([answer(True, 0.9, 0.1)]) == 1.0

    def test_the_mean_box(self):
        # The mean is [0, 0, 0.75, 0.75]: IoU 0.5625 with the whole frame, 0.44 with its quarter.
        assert evaluation.mean_box_hit_rate([[[0, 0, 1, 1]], [], [[0, 0, 0.5, 0.5]]]) == 0.5

    def test_a_perfect_detector(self, shop, cache):
        pytest.importorskip("pycocotools")
        figures = evaluate(RedFinder(), load_frames(shop, "test", cache_dir=cache))
        assert figures["AP"] == pytest.approx(1) and figures["hit_rate"] == 1 and figures["false_alarm_rate"] == 0
        assert figures["num_frames"] == 6 and figures["num_frames_without_product"] == 2
        detector = RedFinder()
        detector.threshold = 0.9
        figures = evaluate(detector, load_frames(shop, "test", cache_dir=cache))
        assert figures["hit_rate"] == 0 and figures["hit_rate_without_threshold"] == 1
        figures = evaluate(detector, load_frames(shop, "test", cache_dir=cache), fit_threshold=True)
        assert figures["hit_rate"] == 1 and detector.threshold == figures["threshold"] < 0.3

    def test_unreadable_frames_count(self, shop, cache, tmp_path):
        pytest.importorskip("pycocotools")
        rows = load_frames(shop, "test", cache_dir=cache)
        lost = rows.map(lambda row: row | {"image": {"path": str(tmp_path / "none.png"), "bytes": None}})
        figures = evaluate(RedFinder(), lost)
        assert figures["hit_rate"] == 0 and sorted(figures["unreadable"]) == sorted(rows["frame_id"])


class TestBoxWriting:
    def write(self, shop, cache, path, detector=None, **options):
        options = {"splits": ["train", "test"], "detector_name": "red", "cache_dir": cache} | options
        return write_boxes(detector or RedFinder(), path, dataset=str(shop), **options)

    def test_a_perfect_detector_writes_the_drawn_boxes(self, shop, cache, tmp_path):
        path = tmp_path / "boxes.jsonl"
        counts = self.write(shop, cache, path)
        assert counts == {"clips": 9, "frames": 18, "boxes": 13, "unreadable": 0, "earlier": 0}
        for view, split in (("pairs", "train"), ("query", "test")):
            made, drawn = (
                load_dataset_view(shop, view, split, cache_dir=cache, boxes_file=file)["boxes"]
                for file in (path, None)
            )
            for ours, theirs in zip(made, drawn, strict=True):
                assert [box is None for box in ours] == [box is None for box in theirs]
                for box, other in zip(ours, theirs):
                    assert box is None or box == pytest.approx(other, abs=1e-4)

    def test_continues_after_an_interruption(self, shop, cache, tmp_path):
        whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
        self.write(shop, cache, whole)
        data = whole.read_bytes()
        torn.write_bytes(data[: len(data) // 2])
        earlier = data[: len(data) // 2].count(b"\n") - 1
        detector = RedFinder()
        counts = self.write(shop, cache, torn, detector)
        assert counts["earlier"] == earlier > 1 and counts["clips"] == 9 - earlier
        assert detector.looked_at == 2 * counts["clips"]
        assert torn.read_bytes() == data

    def test_fewer_frames_are_those_that_evaluation_samples(self, shop, cache, tmp_path):
        self.write(shop, cache, tmp_path / "boxes.jsonl", num_frames=1)
        _, *lines = map(json.loads, (tmp_path / "boxes.jsonl").read_text().splitlines())
        assert all(line["frames"] == [0] and line["num_frames"] == 2 for line in lines)

    def test_another_detectors_file_is_refused(self, shop, cache, tmp_path):
        self.write(shop, cache, tmp_path / "boxes.jsonl")
        with pytest.raises(ValueError, match="begun with detector='red', not 'blue'; name another file"):
            self.write(shop, cache, tmp_path / "boxes.jsonl", detector_name="blue")
        (tmp_path / "other.jsonl").write_text('{"clip_id": "a"}\n')
        with pytest.raises(ValueError, match="does not begin like a box file"):
            self.write(shop, cache, tmp_path / "other.jsonl")

    def test_videos(self, tmp_path):
        """Boxes of a video's frames reach the sampled ones, and an unreadable video is counted."""
        av = pytest.importorskip("av")
        root = tmp_path / "shop"
        root.mkdir()
        with av.open(str(root / "v.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
            for i in range(10):
                picture = np.full((48, 64, 3), 110, dtype=np.uint8)
                if i >= 5:
                    picture[16:48, 32:64] = (250, 20, 20)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        (root / "damaged.mp4").write_bytes(b"no video")
        Image.new("RGB", (8, 8)).save(root / "mug.png")
        (root / "gallery.jsonl").write_text('{"gallery_id": "mug", "image": "mug.png"}\n')
        clips = [
            {"query_id": "v", "video": "v.mp4", "start": 0.6, "end": 2.0, "gt_gallery_ids": ["mug"]},
            {"query_id": "w", "video": "damaged.mp4", "gt_gallery_ids": ["mug"]},
        ]
        (root / "clips_test.jsonl").write_text("\n".join(map(json.dumps, clips)))
        counts = self.write(root, str(tmp_path / "cache"), tmp_path / "boxes.jsonl", splits=["test"])
        assert counts == {"clips": 2, "frames": 7, "boxes": 5, "unreadable": 1, "earlier": 0}
        boxes, frames = BoxFile(tmp_path / "boxes.jsonl").columns("test", "v", None)
        assert frames == [2, 3, 4, 5, 6] and boxes[0] == pytest.approx([0.5, 1 / 3, 1, 1], abs=0.05)


SETTINGS = {"image_size": 32, "max_steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def trained(shop, cache, tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("trained")
    train(DetectorSettings(str(shop), **SETTINGS), folder, cache_dir=cache, save_steps=2, device="cpu")
    return folder


class TestTraining:
    def test_saves_a_detector_with_its_threshold(self, trained):
        record = json.loads((trained / "detector.json").read_text())
        detector = ProductDetector.from_pretrained(str(trained), "cpu")
        assert record["finished"] and record["validation"]["num_frames"] == 6
        assert detector.threshold == record["validation"]["threshold"]
        assert detector.model.config.id2label == {0: "product"}
        assert [path.name for path in trained.glob("checkpoint-*")] == ["checkpoint-4"]

    def test_an_interrupted_run_ends_as_one_run(self, shop, cache, tmp_path, monkeypatch):
        """Frames as they are: what is drawn at random is drawn anew after an interruption."""
        pytest.importorskip("pycocotools")
        monkeypatch.setattr(frames, "_augmentation", v2.Identity)
        settings = DetectorSettings(str(shop), **SETTINGS)
        train(settings, tmp_path / "whole", cache_dir=cache, save_steps=2, device="cpu")
        collate, calls = DetectionCollator.__call__, []

        def fail_late(self, rows):
            calls.append(rows)
            if len(calls) == 4:
                raise OSError("the disk is gone")
            return collate(self, rows)

        monkeypatch.setattr(DetectionCollator, "__call__", fail_late)
        with pytest.raises(OSError, match="the disk is gone"):
            train(settings, tmp_path / "torn", cache_dir=cache, save_steps=2, device="cpu")
        monkeypatch.setattr(DetectionCollator, "__call__", collate)
        train(settings, tmp_path / "torn", cache_dir=cache, save_steps=2, device="cpu")
        models = [ProductDetector.from_pretrained(str(tmp_path / name), "cpu").model for name in ("torn", "whole")]
        for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
            torch.testing.assert_close(weight, other, msg=name)

    def test_a_finished_run_is_kept_and_other_settings_are_refused(self, trained, shop, cache, monkeypatch):
        monkeypatch.setattr(training, "load_frames", lambda *args, **kwargs: pytest.fail("trained again"))
        record = train(DetectorSettings(str(shop), **SETTINGS), trained, cache_dir=cache)
        assert record["finished"]
        with pytest.raises(ValueError, match="holds a detector trained with seed=0, not 1; choose another"):
            train(DetectorSettings(str(shop), **SETTINGS, seed=1), trained, cache_dir=cache)

    def test_fine_tunes_a_detector_of_other_classes(self, shop, cache, tmp_path):
        pytest.importorskip("pycocotools")
        from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

        tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        tiny |= {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 4, "num_labels": 3}
        YolosForObjectDetection(YolosConfig(**tiny)).save_pretrained(tmp_path / "yolos")
        YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "yolos")
        settings = DetectorSettings(str(shop), model=str(tmp_path / "yolos"), max_steps=1, batch_size=2)
        train(settings, tmp_path / "tuned", cache_dir=cache, device="cpu")
        detector = ProductDetector.from_pretrained(str(tmp_path / "tuned"), "cpu", threshold=0.0)
        assert detector.model.config.num_labels == 1
        assert len(detector.detect([Image.new("RGB", (40, 32))])) == 1

    @pytest.mark.slow
    def test_learns_to_find_the_product(self, tmp_path):
        pytest.importorskip("pycocotools")
        sizes = {"num_train_lives": 4, "num_test_lives": 1, "num_workers": 1, "progress": False}
        data = {"data_dir": str(render_mini_lpr4m(tmp_path / "mini", **sizes))}
        settings = DetectorSettings("mini_lpr4m", **data, max_steps=300)
        train(settings, tmp_path / "detector", cache_dir=str(tmp_path / "cache"), device="cpu")
        detector = ProductDetector.from_pretrained(str(tmp_path / "detector"), "cpu")
        figures = evaluate(detector, load_frames("mini_lpr4m", "test", **data, cache_dir=str(tmp_path / "cache")))
        assert figures["hit_rate_without_threshold"] > figures["mean_box_hit_rate"] + 0.05


class TestCommands:
    def test_eval_and_run(self, shop, cache, detector_dir, tmp_path, capsys):
        pytest.importorskip("pycocotools")
        data = ["--dataset", str(shop), "--cache_dir", cache, "--detector", detector_dir, "--device", "cpu"]
        main(["eval", *data, "--split", "test", "--output", str(tmp_path / "figures.json")])
        assert json.loads((tmp_path / "figures.json").read_text())["num_frames"] == 6
        assert "6 frames (test), 4 with the product" in capsys.readouterr().out
        main(["run", *data, "--splits", "test", "--output", str(tmp_path / "boxes.jsonl")])
        assert "3 clips (0 existed already), 6 frames, " in capsys.readouterr().out
        header = BoxFile(tmp_path / "boxes.jsonl").header
        assert header["detector"] == detector_dir and len(header["detector_sha256"]) == 64

    def test_mistakes_end_with_one_sentence(self, shop, tmp_path, detector_dir, capsys):
        data = ["--dataset", shop, "--cache_dir", tmp_path / "cache"]
        line = refusal(capsys, "run", *data, "--detector", tmp_path / "none", "--output", tmp_path / "boxes.jsonl")
        assert line.startswith("python -m retrieval_rice.detector run: error: there is no checkpoint folder")
        line = refusal(capsys, "train", *data, "--output_dir", tmp_path / "out", "--image_size", "33")
        assert "image_size must be a multiple of 32, got 33" in line
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "config.json").write_text("{}")
        line = refusal(capsys, "eval", *data, "--detector", tmp_path / "bad")
        assert "incomplete checkpoint: model.safetensors is missing" in line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def build(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = RiceConfig(projection_dim=16, decoder_num_heads=2, **settings)
        RiceModel(config).save_pretrained(folder)
        processor = build_processor(train_tokenizer(["a red mug"] * 20), 32, config.mask_patch_size, 2)
        processor.save_pretrained(folder)
        return str(folder)

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    resnet = {"vision_config": resnet | {"layer_type": "basic"}, "decoder_position_embeddings": False}
    return {
        "clip": build("clip", vision_config=vision | {"image_size": 32, "patch_size": 8}),
        "resnet": build("resnet", **resnet, vision_pooling="mean"),
        "pooling": build("pooling", **resnet, vision_pooling="mean", patch_mask_pooling=True),
    }


class TestEvaluation:
    """`eval_rice.py --boxes`."""

    def run(self, model, shop, cache, output, *more):
        arguments = [
            "--model",
            model,
            "--dataset",
            shop,
            "--output_dir",
            output,
            "--num_workers",
            0,
            "--device",
            "cpu",
        ]
        eval_rice.main([str(a) for a in [*arguments, "--cache_dir", cache, "--baselines", "chance", *more]])
        read_results(output / "results.json")
        return json.loads((output / "results.json").read_text())

    @pytest.mark.parametrize("name", ["clip", "pooling"])
    def test_a_perfect_detectors_boxes_are_the_true_ones(self, checkpoint, name, shop, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(ProductDetector, "from_pretrained", lambda *args: RedFinder())
        masks = []
        encode = ModelRetriever.encode_clips

        def encode_and_note(self, inputs):
            masks.append(inputs.get("patch_mask"))
            return encode(self, inputs)

        monkeypatch.setattr(ModelRetriever, "encode_clips", encode_and_note)
        results = {}
        for boxes, more in (("ground_truth", ()), ("detector", ("--detector", "red")), ("none", ())):
            results[boxes] = self.run(checkpoint[name], shop, cache, tmp_path / boxes, "--boxes", boxes, *more)
        # Each run encodes the validation split, for the fusion weight, and the test split.
        assert len(masks) == 6 and masks[4] is masks[5] is None
        for drawn, found in zip(masks[:2], masks[2:4]):
            assert torch.equal(drawn, found) and not drawn.all()
        assert results["detector"]["scores"] == results["ground_truth"]["scores"]
        assert results["detector"]["protocol"]["boxes"] == "detector"
        origin = results["detector"]["protocol"]["detector"]
        assert origin["detector"] == "red" and (origin["boxes"], origin["frames"]) == (4, 6)
        assert "detector" not in results["none"]["protocol"]
        file = tmp_path / "detector" / "boxes.jsonl"
        again = self.run(checkpoint[name], shop, cache, tmp_path / "file", "--boxes", "detector", "--boxes_file", file)
        assert again["scores"] == results["detector"]["scores"]

    def test_refusals(self, checkpoint, shop, cache, tmp_path, capsys):
        def sentence(name, *more):
            with pytest.raises(SystemExit) as end:
                self.run(checkpoint[name], shop, cache, tmp_path / "out", *more)
            assert end.value.code == 2
            return capsys.readouterr().err.strip().splitlines()[-1]

        assert "--boxes detector needs either --detector or --boxes_file" in sentence("clip", "--boxes", "detector")
        assert "--detector goes with --boxes detector, not with --boxes none" in sentence("clip", "--detector", "red")
        line = sentence("resnet", "--boxes", "ground_truth")
        assert (
            "does not support patch masks; evaluate with --boxes none, or train with --model.patch_mask_pooling true"
            in line
        )
        line = sentence("clip", "--boxes", "detector", "--boxes_file", tmp_path / "none.jsonl")
        assert "none.jsonl does not exist; write it with python -m retrieval_rice.detector run" in line
