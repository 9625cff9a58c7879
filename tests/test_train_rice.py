"""The training command from end to end, on a mini LPR4M of a few dozen clips."""

import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

import eval_rice
import train_rice
from data_rice import load_dataset_view
from data_rice.mini_lpr4m import render_mini_lpr4m
from training_rice import arguments as arguments_module
from training_rice.arguments import parse_arguments

REPOSITORY = Path(train_rice.__file__).parent
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
RECIPE = f"""
dataset: mini_lpr4m
validation_fraction: 0.3
num_frames: 3
train_num_frames: 2
vocab_size: 400
model:
  vision_config: {json.dumps(VISION)}
  projection_dim: 16
  decoder_num_heads: 4
  logit_scale_init_value: 10.0
  matching_scale: 10.0
per_device_train_batch_size: 8
max_steps: 4
learning_rate: 1e-2
logging_steps: 1
eval_strategy: steps
eval_steps: 2
save_strategy: steps
save_steps: 2
load_best_model_at_end: true
report_to: none
disable_tqdm: true
use_cpu: true
"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Three livestreams with thirty pairs to train on, one with ten queries to validate on, one to test on."""
    folder = tmp_path_factory.mktemp("data") / "mini"
    sizes = {"num_train_lives": 4, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    return render_mini_lpr4m(folder, **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)


@pytest.fixture(scope="module")
def command(mini, tmp_path_factory):
    """A function that gives the words of a training command."""
    folder = tmp_path_factory.mktemp("work")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    def command(output_dir, *words: str, data_dir=mini) -> list[str]:
        folders = ["--data_dir", str(data_dir), "--cache_dir", str(folder / "cache"), "--output_dir", str(output_dir)]
        return [str(recipe), *folders, *words]

    return command


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that was not disturbed. Tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.set_num_threads(1)
    train_rice.main(command(folder))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def refusal(command, tmp_path, capsys):
    """A function that returns the one sentence with which a training command ends."""

    def refusal(*words: str, output_dir=None, **options) -> str:
        with pytest.raises(SystemExit) as error:
            train_rice.main(command(output_dir or tmp_path / "refused", *words, **options))
        assert error.value.code == 2
        message = capsys.readouterr().err.rstrip("\n")
        message = message[message.rindex("train_rice.py: error: ") :]
        assert "\n" not in message
        return message

    return refusal


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def results(folder) -> dict:
    return json.loads((Path(folder) / "train_results.json").read_text())


def history(folder) -> list[dict]:
    """What was logged at each step, from the newest checkpoint."""
    newest = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return [
        entry for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


def interrupt(monkeypatch, step: int) -> None:
    """Makes the next run break off in the middle of a step, counted from 1."""
    original, steps = train_rice.RiceTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train_rice.RiceTrainer, "training_step", training_step)


class TestRun:
    def test_what_it_leaves(self, finished):
        assert {path.name for path in finished.iterdir()} >= {
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "train_arguments.json",
            "train_results.json",
            "checkpoint-4",
        }
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

    def test_goes_on_from_a_model(self, finished, command, tmp_path):
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


class TestWhatARunShows:
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


class TestInterruption:
    @pytest.mark.parametrize(
        ("save_steps", "broken_off", "half_written"), [(2, 4, None), (3, 5, None), (2, 6, "model.safetensors")]
    )
    def test_same_weights_as_undisturbed(
        self, command, tmp_path, monkeypatch, caplog, save_steps, broken_off, half_written
    ):
        """Three steps are an epoch; dropout is on, and evaluations draw random numbers too."""
        words = ["--max_steps", "6", "--save_steps", str(save_steps), "--eval_steps", str(save_steps)]
        words += ["--model.decoder_dropout", "0.1"]
        train_rice.main(command(tmp_path / "whole", *words))
        disturbed = tmp_path / "disturbed"
        with monkeypatch.context() as patch:
            interrupt(patch, broken_off)
            with pytest.raises(KeyboardInterrupt):
                train_rice.main(command(disturbed, *words))
        assert not (disturbed / "model.safetensors").exists()
        newest = disturbed / f"checkpoint-{(broken_off - 1) // save_steps * save_steps}"
        expected = newest
        if half_written:
            content = (newest / half_written).read_bytes()
            (newest / half_written).write_bytes(content[: len(content) // 2])
            expected = disturbed / f"checkpoint-{int(newest.name.removeprefix('checkpoint-')) - save_steps}"
        with caplog.at_level(logging.INFO):
            train_rice.main(command(disturbed, *words))
        assert f"Going on from {expected}." in caplog.text
        assert (f"Passing over {newest}: it is half-written" in caplog.text) == bool(half_written)
        assert_same_weights(disturbed, tmp_path / "whole")
        for name, value in results(tmp_path / "whole").items():
            if "R@" in name or name == "eval_fusion_weight":
                assert results(disturbed)[name] == value, name

    def test_random_frames_and_augmentation_too(self, command, tmp_path, monkeypatch):
        words = ["--frame_sampling", "random", "--augment_crop", "0.5", "--augment_flip", "0.5"]
        train_rice.main(command(tmp_path / "whole", *words))
        interrupt(monkeypatch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_rice.main(command(tmp_path / "disturbed", *words))
        monkeypatch.undo()
        train_rice.main(command(tmp_path / "disturbed", *words))
        assert_same_weights(tmp_path / "disturbed", tmp_path / "whole")

    def test_before_the_first_checkpoint(self, command, finished, tmp_path, monkeypatch):
        """The folder then holds arguments only, and may be used with others."""
        with monkeypatch.context() as patch:
            interrupt(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                train_rice.main(command(tmp_path / "run", "--learning_rate", "1"))
        train_rice.main(command(tmp_path / "run"))
        assert_same_weights(tmp_path / "run", finished)

    def test_after_the_last_checkpoint(self, command, finished, copied):
        for name in ("model.safetensors", "config.json", "train_results.json"):
            (copied / name).unlink()
        train_rice.main(command(copied))
        assert_same_weights(copied, finished)
        assert not (copied / "checkpoint-5").exists()
        assert results(copied)["eval_fused_R@1"] == results(finished)["eval_fused_R@1"]

    def test_finished_run_stays_as_it_is(self, command, copied, caplog):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.rglob("*") if path.is_file()}
        with caplog.at_level(logging.INFO):
            train_rice.main(command(copied))
        assert f"The run in {copied} is finished, there is nothing to do." in caplog.text
        after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.rglob("*") if path.is_file()}
        assert after == before

    def test_other_arguments(self, refusal, copied):
        message = refusal("--learning_rate", "0.5", output_dir=copied)
        assert f"{copied} holds a run with learning_rate=0.01, not 0.5; choose another output_dir" in message
        shutil.rmtree(copied / "checkpoint-4")
        assert "num_frames=3, not 2" in refusal("--num_frames", "2", output_dir=copied)

    def test_asked_for_a_half_written_checkpoint(self, refusal, copied):
        (copied / "checkpoint-4" / "optimizer.pt").unlink()
        asked = str(copied / "checkpoint-4")
        message = refusal("--resume_from_checkpoint", asked, output_dir=copied)
        assert f"resume_from_checkpoint: {asked} is half-written (optimizer.pt is missing)" in message


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

    def test_model_that_cannot_be(self, refusal):
        assert "decoder_num_heads=5" in refusal("--model.decoder_num_heads", "5")
        assert "projection_dim" in refusal("--model.projection_dim", "wide")

    def test_unknown_argument(self, command, tmp_path, capsys):
        with pytest.raises(SystemExit) as error:
            train_rice.main(command(tmp_path / "run", "--learning_rat", "1"))
        assert error.value.code == 2
        assert "did you mean 'learning_rate'?" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def environment():
    """What a shell has, on a machine whose GPUs are left alone."""
    ours = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {name: value for name, value in kept.items() if name not in launcher} | ours


@pytest.fixture(scope="module")
def launch(command, environment):
    """A function that runs `accelerate launch train_rice.py` and returns what was printed."""

    def launch(options: list[str], *words, **extra: str) -> str:
        start = [sys.executable, "-m", "accelerate.commands.launch", *options, str(REPOSITORY / "train_rice.py")]
        finished = subprocess.run(
            start + command(*words), env=environment | extra, capture_output=True, text=True, timeout=300
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout + finished.stderr

    return launch


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """The folder and the printed text of a run of two processes, each with half of the batch."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = ["--per_device_train_batch_size", "4", "--model.decoder_dropout", "0"]
    run = lambda: launch(options, folder, *words, ACCELERATE_USE_CPU="true")  # noqa: E731
    return folder, run(), run


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class TestProcesses:
    def test_two_work_together(self, two):
        folder, text, _ = two
        assert "2 process(es) x batch 4: negatives per query = 7" in text
        # Once: the second process leaves the talking to the first.
        assert text.count("negatives per query") == 1
        assert AutoModel.from_pretrained(folder).config.projection_dim == 16
        assert results(folder)["unreadable_media"] == 0
        assert json.loads((folder / "train_arguments.json").read_text())["num_processes"] == 2
        assert len(list((folder / "checkpoint-4").glob("rng_state_*.pth"))) == 2

    def test_same_losses_as_one(self, two, command, tmp_path):
        """accelerate deals batch by batch from one order, so two halves are the batch of one process."""
        train_rice.main(command(tmp_path / "one", "--model.decoder_dropout", "0"))
        together, alone = history(two[0]), history(tmp_path / "one")
        assert len(together) == len(alone) == 4
        # Logged with six digits; later steps drift apart, since Adam blows up rounding where gradients vanish.
        for a, b, tolerance in zip(together, alone, (2e-5, 1e-3, 2e-3, 2e-3), strict=True):
            for name in ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-6), (a["epoch"], name)

    def test_two_go_on(self, two, tmp_path):
        folder, _, run = two
        undisturbed = shutil.copytree(folder, tmp_path / "undisturbed")
        shutil.rmtree(folder / "checkpoint-4")
        for name in ("model.safetensors", "train_results.json"):
            (folder / name).unlink()
        assert f"Going on from {folder / 'checkpoint-2'}." in run()
        assert_same_weights(folder, undisturbed)

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2])
    def test_killed_several_times(self, command, environment, tmp_path, processes):
        """All of them at once, wherever they are; steps, checkpoints and validations included."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]

        def start(folder: Path) -> subprocess.Popen:
            words = ["--per_device_train_batch_size", "4", "--max_steps", "40"]
            words += ["--save_steps", "4", "--eval_steps", "4"]
            words += ["--model.decoder_dropout", "0.1", "--augment_crop", "0.5", "--augment_flip", "0.5"]
            words += ["--frame_sampling", "random", "--dataloader_num_workers", "1", "--ema_decay", "0.9"]
            words += ["--memory_queue_size", "16", "--batch_sampler", "random" if processes == 1 else "same_live"]
            port = [str(free_port())] if processes > 1 else []
            return subprocess.Popen(
                [*launcher, *port, str(REPOSITORY / "train_rice.py"), *command(folder, *words)],
                env=environment | {"ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        undisturbed = start(whole)
        assert undisturbed.wait(timeout=300) == 0, undisturbed.stderr.read()
        generator, kills = random.Random(5), 0
        for step in (4, 12, 20, 36):
            running = start(killed)
            deadline = time.monotonic() + 300
            while running.poll() is None and not (killed / f"checkpoint-{step}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(generator.random())
            assert running.poll() in (None, 0), running.stderr.read()
            if running.poll() is None:
                kills += 1
                # A launcher's workers are in groups of their own.
                family = psutil.Process(running.pid).children(recursive=True)
                for process in [running, *family]:
                    process.kill()
                psutil.wait_procs(family)
            running.communicate()
        assert kills >= 3
        last = start(killed)
        assert last.wait(timeout=300) == 0, last.stderr.read()
        assert_same_weights(killed, whole)

    @pytest.mark.slow
    def test_torchrun_without_the_variable(self, command, environment, tmp_path):
        """Two processes that would each train alone, into one folder."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = command(tmp_path / "run", "--use_cpu", "false")
        started = subprocess.run(
            [*launcher, str(REPOSITORY / "train_rice.py"), *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert started.returncode != 0
        assert "2 processes were started, but this one sees 1" in started.stderr
        assert not (tmp_path / "run" / "train_arguments.json").exists()

    @pytest.mark.slow
    def test_accelerate_with_one(self, launch, finished, tmp_path):
        text = launch(["--cpu", "--num_processes", "1"], tmp_path / "run")
        assert "1 process(es) x batch 8: negatives per query = 7" in text
        assert_same_weights(tmp_path / "run", finished)
