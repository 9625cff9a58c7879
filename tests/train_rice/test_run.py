"""The training command from end to end, on a mini LPR4M of a few dozen clips."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

import eval_rice
import rice_cli
import train_rice
from data_rice import load_dataset_view
from tests.train_rice.runs import RECIPE, REPOSITORY, VISION, assert_same_weights, history, results
from training_rice import arguments as arguments_module
from training_rice.arguments import parse_arguments


class TestRun:
    def test_output_files_of_a_run(self, finished):
        assert {path.name for path in finished.iterdir()} >= {
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "train_arguments.json",
            "train_results.json",
            "checkpoint-4",
        }
        arguments = json.loads((finished / "train_arguments.json").read_text())
        assert (arguments["metric_for_best_model"], arguments["greater_is_better"]) == ("eval_fused_R@1", True)
        metrics = results(finished)
        assert metrics["unreadable_media"] == 0
        for name in ("train_loss", "eval_embedding_R@1", "eval_matching_R@1", "eval_fused_R@1", "eval_fusion_weight"):
            assert name in metrics
        for entry in history(finished):
            assert {"contrastive_loss", "matching_loss", "reconstruction_loss", "logit_scale"} < entry.keys()

    def test_model_and_processor_load(self, finished):
        model, processor = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
        assert processor.video_processor.num_frames == 3
        gallery = model.encode_gallery(**processor(images=[Image.new("RGB", (50, 40))]))
        assert gallery.embeds.shape == (1, 16)
        assert model.config.fusion_weight == results(finished)["eval_fusion_weight"]

    def test_best_checkpoint_is_the_final_model(self, finished):
        state = json.loads((finished / "checkpoint-4" / "trainer_state.json").read_text())
        assert_same_weights(finished, finished / Path(state["best_model_checkpoint"]).name)
        scores = [entry["eval_fused_R@1"] for entry in state["log_history"] if "eval_fused_R@1" in entry]
        assert results(finished)["eval_fused_R@1"] == max(scores) == state["best_metric"]

    def test_evaluates(self, finished, mini, tmp_path):
        data = ["--dataset", "mini_lpr4m", "--data_dir", str(mini), "--split", "test"]
        eval_rice.main(["--model", str(finished), *data, "--output_dir", str(tmp_path / "scores")])
        report = json.loads((tmp_path / "scores" / "results.json").read_text())
        assert report["scores"].keys() == {"embedding", "matching", "fused"}
        assert report["num_queries"] == 5
        assert report["fusion_weight"] == results(finished)["eval_fusion_weight"]

    def test_continues_from_a_model(self, finished, command, tmp_path):
        words = ["--model_name_or_path", str(finished), "--learning_rate", "0", "--max_steps", "2"]
        train_rice.main(command(tmp_path / "next", *words, "--model", "{matching_negatives: all}"))
        assert_same_weights(tmp_path / "next", finished)
        assert AutoModel.from_pretrained(tmp_path / "next").config.matching_negatives == "all"
        for name in ("tokenizer.json", "processor_config.json"):
            assert (tmp_path / "next" / name).read_text() == (finished / name).read_text()

    @pytest.mark.parametrize("whole", [False, True])
    def test_starts_from_an_encoder(self, command, tmp_path, whole):
        vision = CLIPVisionConfig(**VISION)
        if whole:
            text = {**VISION, "vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
            text = {name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
            clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text))
        else:
            clip = CLIPVisionModel(vision)
        clip.save_pretrained(tmp_path / "clip")
        words = ["--init_vision_from", str(tmp_path / "clip"), "--learning_rate", "0", "--max_steps", "2"]
        train_rice.main(command(tmp_path / "run", *words))
        source = getattr(clip, "vision_model", clip).state_dict()
        trained = AutoModel.from_pretrained(tmp_path / "run").vision_model.state_dict()
        for name, value in source.items():
            assert torch.equal(trained[name], value), name


class TestRunOutput:
    @pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
    def test_profile(self, command, tmp_path, caplog, workers):
        """Parts add up to the step, and nothing is left behind."""
        with caplog.at_level(logging.INFO):
            train_rice.main(
                command(tmp_path / "run", "--profile", "--max_steps", "6", "--dataloader_num_workers", workers)
            )
        table = next(record.getMessage() for record in caplog.records if "part of a step" in record.getMessage())
        shares = {line[:16].strip(): float(line[26:].strip("% ")) for line in table.splitlines()[1:-1]}
        for part in ("data wait", "encoder", "decoder", "backward", "optimiser"):
            assert shares[part] > 0, part
        assert sum(shares.values()) - shares["whole step"] == pytest.approx(100, abs=1)
        assert ("1 worker(s)" in table) == (workers == "1")
        assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]

    def test_summary_and_logs(self, command, tmp_path, caplog):
        words = ["--max_steps", "2", "--report_to", "tensorboard", "--eval_steps", "1", "--save_steps", "2"]
        with caplog.at_level(logging.INFO):
            train_rice.main(command(tmp_path / "run", *words))
        for line in ("clips per second", "share of time waiting for data", "validation R@1, fused"):
            assert line in caplog.text
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))
        for entry in history(tmp_path / "run"):
            for name in ("contrastive_accuracy", "matching_accuracy", "data_wait_share"):
                assert 0 <= entry[name] <= 1, name
            assert entry["clips_per_second"] > 0
            assert entry["memory_gb"] > 0

    def test_reporters(self, command, tmp_path, monkeypatch):
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setattr(arguments_module, "is_tensorboard_available", lambda: True)
        monkeypatch.setattr(arguments_module, "is_wandb_available", lambda: True)

        def reporters() -> list[str]:
            return parse_arguments(command(tmp_path / "run", "--report_to", "auto"))[2].report_to

        assert reporters() == ["tensorboard"]
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
        assert reporters() == ["tensorboard", "wandb"]
        monkeypatch.setattr(arguments_module, "is_tensorboard_available", lambda: False)
        (tmp_path / "netrc").unlink()
        assert reporters() == []


class TestRecipes:
    """The published recipes start: a tiny encoder and batch, one step, on folders of their layout."""

    @pytest.fixture
    def clip(self, tmp_path):
        vision = {**VISION, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12}
        text = {**VISION, "vocab_size": 60, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
        text = {name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(
            tmp_path / "clip"
        )
        return tmp_path / "clip"

    @pytest.fixture
    def start(self, clip, tmp_path):
        def start(recipe: str, data_dir, *words: str) -> Path:
            output_dir = tmp_path / "run"
            folders = [
                "--data_dir",
                str(data_dir),
                "--output_dir",
                str(output_dir),
                "--cache_dir",
                str(tmp_path / "cache"),
            ]
            small = ["--init_vision_from", str(clip), "--model.projection_dim", "16", "--max_steps", "1"]
            small += ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "0", "--vocab_size", "400"]
            machine = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
            train_rice.main([str(REPOSITORY / "configs" / recipe), *folders, *small, *machine, *words])
            return output_dir

        return start

    @pytest.mark.parametrize("recipe", ["lpr4m_750k.yaml", "lpr4m_full.yaml"])
    def test_lpr4m(self, start, mini, recipe):
        output_dir = start(recipe, mini, "--validation_fraction", "0.3")
        assert results(output_dir)["eval_embedding_R@1"] >= 0
        arguments = json.loads((output_dir / "train_arguments.json").read_text())
        assert (arguments["learning_rate"], arguments["vision_learning_rate"]) == (3e-4, 3e-7)

    def test_moving_fashion(self, start, tmp_path):
        """Each product one video of five levels of grey and one image."""
        av = pytest.importorskip("av")
        root = tmp_path / "moving_fashion"
        for folder in ("videos", "imgs"):
            (root / folder).mkdir(parents=True)
        for split, numbers in (("train", range(40)), ("test", range(40, 44))):
            entries = {}
            for number in numbers:
                with av.open(str(root / f"videos/{number}.mp4"), "w") as container:
                    stream = container.add_stream("mpeg4", rate=1)
                    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                    for level in range(5):
                        picture = np.full((32, 32, 3), 40 * level + number, dtype=np.uint8)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    container.mux(stream.encode())
                Image.new("RGB", (32, 32), (4 * number, 90, 20)).save(root / f"imgs/{number}.jpg")
                entries[str(number)] = {
                    "video_paths": [f"videos/{number}.mp4"],
                    "img_path": f"imgs/{number}.jpg",
                    "source": 1,
                }
            (root / f"{split}.json").write_text(json.dumps(entries))
        output_dir = start("moving_fashion.yaml", root, "--validation_fraction", "0.2")
        config = AutoModel.from_pretrained(output_dir).config
        assert (config.decoder_token_source, config.decoder_num_heads) == ("raw", 12)


class TestBadInput:
    def test_unreadable_media(self, mini, command, tmp_path, caplog):
        rows = load_dataset_view(str(mini), "pairs", "train", validation_fraction=0.3)
        damaged = shutil.copytree(mini, tmp_path / "damaged")

        def inside(path: str) -> Path:
            return damaged / Path(path).relative_to(mini)

        corrupt, missing = inside(rows[0]["image"]["path"]), inside(rows[7]["frames"][1]["path"])
        gone = [inside(frame["path"]) for frame in rows[12]["frames"]]
        corrupt.write_bytes(corrupt.read_bytes()[:50])
        for path in (missing, *gone):
            path.unlink()
        run = tmp_path / "run"
        words = ["--max_steps", "12", "--eval_strategy", "no", "--load_best_model_at_end", "no", "--num_frames", "3"]
        train_rice.main(command(run, *words, "--train_num_frames", "3", data_dir=damaged))
        listed = [json.loads(line) for line in (run / "unreadable_media.jsonl").read_text().splitlines()]
        files = {entry["file"] for entry in listed}
        assert files == {str(path) for path in (corrupt, missing, *gone)}
        assert {entry["id"] for entry in listed} >= {rows[7]["clip_id"], rows[12]["clip_id"]}
        assert results(run)["unreadable_media"] == len(files) == 5
        assert "5 unreadable files were left out of training" in caplog.text
        assert (run / "model.safetensors").is_file()

    @pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
    def test_nothing_readable(self, refusal, mini, tmp_path, workers):
        damaged = shutil.copytree(mini, tmp_path / "damaged")
        shutil.rmtree(damaged / "training_image")
        words = ["--eval_strategy", "no", "--load_best_model_at_end", "no", "--dataloader_num_workers", workers]
        message = refusal(*words, data_dir=damaged)
        assert "error: None of the 8 pairs of a batch could be read" in message
        assert "unreadable_media.jsonl" in message

    def test_fewer_pairs_than_a_batch(self, refusal):
        message = refusal("--per_device_train_batch_size", "31")
        assert "mini_lpr4m has 30 training pairs, fewer than one batch of 31" in message

    def test_too_few_for_the_negatives(self, refusal):
        message = refusal("--per_device_train_batch_size", "3", "--model.num_hard_negatives", "3")
        assert "3 hard negatives needs a global batch of at least 4, got 3" in message

    def test_missing_data(self, refusal, tmp_path):
        message = refusal(data_dir=tmp_path / "nowhere")
        assert f"{tmp_path / 'nowhere'} does not exist; render it with" in message
        # A corrected command may use the same folder.
        assert "nowhere2" in refusal(data_dir=tmp_path / "nowhere2")

    def test_no_validation_split(self, tmp_path, capsys):
        shop = tmp_path / "shop"
        shop.mkdir()
        Image.new("RGB", (8, 8)).save(shop / "a.png")
        (shop / "gallery.jsonl").write_text(json.dumps({"gallery_id": "g", "image": "a.png"}) + "\n")
        clips = [{"query_id": f"c{i}", "frames": ["a.png"], "gt_gallery_ids": ["g"]} for i in range(8)]
        (shop / "clips_train.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
        recipe = tmp_path / "shop.yaml"
        lines = [line for line in RECIPE.splitlines() if not line.startswith(("dataset", "validation"))]
        recipe.write_text("\n".join(lines))
        with pytest.raises(SystemExit) as error:
            train_rice.main([str(recipe), "--dataset", str(shop), "--output_dir", str(tmp_path / "run")])
        assert error.value.code == 2
        message = capsys.readouterr().err.strip()
        assert "validation" in message
        assert message.endswith("Set eval_strategy to 'no' to train without validation.")

    def test_missing_model(self, refusal, tmp_path):
        message = refusal("--model_name_or_path", str(tmp_path / "nowhere"))
        assert f"there is no checkpoint folder {tmp_path / 'nowhere'}" in message

    def test_impossible_model(self, refusal):
        assert "decoder_num_heads=5" in refusal("--model.decoder_num_heads", "5")
        assert "projection_dim" in refusal("--model.projection_dim", "wide")

    def test_unknown_argument(self, command, tmp_path, capsys):
        with pytest.raises(SystemExit) as error:
            train_rice.main(command(tmp_path / "run", "--learning_rat", "1"))
        assert error.value.code == 2
        assert "did you mean 'learning_rate'?" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("words", [["--learning_rat", "1"], ["--per_device_train_batch_size", "31"]])
    def test_as_a_verb_of_rice(self, command, tmp_path, capsys, words):
        with pytest.raises(SystemExit) as error:
            rice_cli.main(["train", *command(tmp_path / "run", *words)])
        assert error.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("rice train: error: ")
