"""Models to start from, checkpoints to go on from, and the record of a run's arguments."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, ResNetConfig, ResNetModel

from training_rice.arguments import DataArguments, ModelArguments, RiceTrainingArguments
from training_rice.setup import (
    RESULTS_FILE,
    build_model,
    build_rice_processor,
    check_processes,
    find_checkpoint,
    is_finished,
    is_trained,
    read_texts,
    record_arguments,
    why_broken,
)

TEXT_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_TOWER |= {"vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def training(tmp_path):
    return RiceTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


@pytest.fixture
def saved(make_model, processor, tmp_path):
    """A saved RICE checkpoint with its processor."""
    folder = tmp_path / "rice"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def write_checkpoint(make_model, tmp_path):
    """A function that writes a training checkpoint after a step of 10."""
    model = make_model()

    def write(step: int, folder: str = "run") -> str:
        path = tmp_path / folder / f"checkpoint-{step}"
        model.save_pretrained(path)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": step}, path / name)
        path.joinpath("trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 10}))
        return str(path)

    return write


def cut(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class TestProcesses:
    def test_several_that_do_not_see_each_other(self, training, monkeypatch):
        check_processes(training)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes were started, but this one sees 1; .*ACCELERATE_USE_CPU"):
            check_processes(training)

    def test_several_gpus_of_one_process(self):
        with pytest.raises(ValueError, match="one process sees 4 GPUs.*--num_processes 4"):
            check_processes(SimpleNamespace(world_size=1, n_gpu=4))


class TestModel:
    def test_new(self, model_settings):
        model = build_model(ModelArguments(model=model_settings))
        assert model.config.projection_dim == 16
        assert model.config.vision_config.hidden_size == 32

    def test_field_of_the_wrong_kind(self, model_settings):
        with pytest.raises(ValueError, match="model section: .*'projection_dim' expected int") as error:
            build_model(ModelArguments(model=model_settings | {"projection_dim": "wide"}))
        assert "\n" not in str(error.value)

    def test_from_checkpoint(self, saved, make_model):
        model = build_model(ModelArguments(model_name_or_path=str(saved), model={"matching_negatives": "all"}))
        for name, value in make_model().state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
        assert model.config.matching_negatives == "all"

    def test_from_checkpoint_in_half_precision(self, make_model, tmp_path):
        make_model().half().save_pretrained(tmp_path / "half")
        model = build_model(ModelArguments(model_name_or_path=str(tmp_path / "half"), model={}))
        assert {value.dtype for value in model.parameters()} == {torch.float32}

    def test_decoder_may_be_new_or_left_out(self, saved, make_model, tmp_path):
        without = build_model(ModelArguments(model_name_or_path=str(saved), model={"use_decoder": False}))
        assert without.decoder is None
        without.save_pretrained(tmp_path / "icl")
        grown = build_model(ModelArguments(model_name_or_path=str(tmp_path / "icl"), model={"use_decoder": True}))
        assert grown.decoder is not None
        for name, value in without.state_dict().items():
            assert torch.equal(grown.state_dict()[name], value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"projection_dim": 32}, "does not fit the weights of .* change shapes: projection_dim"),
            ({"vision_config": {"num_hidden_layers": 2}}, "does not fit"),
            ({"decoder_num_self_layers": 2}, "does not fit"),
            ({"vision_config": {"model_type": "resnet"}}, "is a resnet, but the encoder of .* is a clip_vision_model"),
        ],
    )
    def test_checkpoint_that_does_not_fit(self, saved, model_settings, changes, message):
        settings = dict(changes)
        if "model_type" not in changes.get("vision_config", {"model_type": ""}):
            settings["vision_config"] = model_settings["vision_config"] | changes["vision_config"]
        with pytest.raises(ValueError, match=message):
            build_model(ModelArguments(model_name_or_path=str(saved), model=settings))

    def test_missing_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            build_model(ModelArguments(model_name_or_path=str(tmp_path / "nothing"), model={}))

    def test_cut_checkpoint(self, saved):
        cut(saved / "model.safetensors")
        with pytest.raises(ValueError, match="model.safetensors is cut short"):
            build_model(ModelArguments(model_name_or_path=str(saved), model={}))

    def test_checkpoint_of_another_model(self, clip_vision_config, tmp_path):
        CLIPVisionModel(clip_vision_config).save_pretrained(tmp_path / "clip")
        with pytest.raises(ValueError, match="is a clip_vision_model model, no RICE checkpoint; init_vision_from"):
            build_model(ModelArguments(model_name_or_path=str(tmp_path / "clip"), model={}))

    def test_two_starting_points(self, saved):
        with pytest.raises(ValueError, match="pass one of them"):
            build_model(ModelArguments(model_name_or_path=str(saved), init_vision_from=str(saved), model={}))


class TestEncoder:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("whole", [False, True])
    def test_clip(self, clip_vision_config, model_settings, tmp_path, whole, dtype):
        clip = CLIPVisionModel(clip_vision_config)
        if whole:
            vision = clip_vision_config.to_dict() | {"dtype": None}
            clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT_TOWER))
        clip.to(dtype).save_pretrained(tmp_path / "clip")
        settings = {name: value for name, value in model_settings.items() if name != "vision_config"}
        model = build_model(ModelArguments(init_vision_from=str(tmp_path / "clip"), model=settings))
        assert model.config.vision_config.hidden_size == 32
        source = dict(getattr(clip, "vision_model", clip).named_parameters())
        copied = dict(model.vision_model.named_parameters())
        assert copied.keys() == source.keys()
        for name, value in copied.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, source[name].float())
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        model(torch.zeros(4, 3, 32, 32), torch.zeros(4, 1, 3, 32, 32)).loss.backward()

    def test_batch_norms_come_along(self, resnet_settings, tmp_path):
        vision = {name: value for name, value in resnet_settings["vision_config"].items() if name != "model_type"}
        encoder = ResNetModel(ResNetConfig(**vision))
        encoder(torch.randn(2, 3, 32, 32))
        encoder.save_pretrained(tmp_path / "resnet")
        model = build_model(ModelArguments(init_vision_from=str(tmp_path / "resnet"), model=resnet_settings))
        for name, value in encoder.state_dict().items():
            assert torch.equal(model.vision_model.state_dict()[name], value), name

    def test_missing_folder(self, tmp_path, model_settings):
        with pytest.raises(FileNotFoundError, match="nothing"):
            build_model(ModelArguments(init_vision_from=str(tmp_path / "nothing"), model=model_settings))


class TestProcessor:
    def test_new_follows_the_encoder(self, make_model):
        processor = build_rice_processor(ModelArguments(), DataArguments(vocab_size=400), make_model().config, [])
        assert processor.image_processor.size["height"] == 32
        assert processor.video_processor.num_frames == 10

    def test_of_a_checkpoint_follows_the_arguments(self, saved, make_model):
        arguments = ModelArguments(model_name_or_path=str(saved))
        former = build_rice_processor(arguments, DataArguments(num_frames=4), make_model().config, [])
        assert (former.image_processor.size["height"], former.video_processor.num_frames) == (32, 4)
        resized = build_rice_processor(arguments, DataArguments(image_size=48), make_model().config, [])
        assert (resized.image_processor.size["width"], resized.video_processor.size["height"]) == (48, 48)

    def test_texts_are_spread_and_distinct(self, pairs):
        assert read_texts(pairs, DataArguments()) == ["a red mug"]
        assert len(read_texts(pairs, DataArguments(tokenizer_texts=1))) == 1


class TestCheckpoints:
    def test_newest_by_number(self, training, write_checkpoint):
        assert find_checkpoint(training) is None
        for step in (8, 9, 10):
            newest = write_checkpoint(step)
        assert find_checkpoint(training) == newest

    def test_other_names_are_left_alone(self, training, write_checkpoint, tmp_path):
        whole = write_checkpoint(5)
        (tmp_path / "run" / "checkpoint-best").mkdir()
        (tmp_path / "run" / "checkpoint-9").write_text("no folder")
        assert find_checkpoint(training) == whole

    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"],
    )
    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_half_written_is_passed_over(self, training, write_checkpoint, caplog, name, damage):
        whole, newest = write_checkpoint(4), write_checkpoint(6)
        path = Path(newest) / name
        path.unlink() if damage == "missing" else cut(path)
        assert find_checkpoint(training) == whole
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert newest in warning
        assert "half-written" in warning
        assert name.partition(".")[0] in warning or damage == "cut"

    def test_asked_for(self, training, write_checkpoint):
        older, _ = write_checkpoint(4), write_checkpoint(6)
        assert find_checkpoint(dataclasses.replace(training, resume_from_checkpoint=older)) == older

    def test_asked_for_and_half_written(self, training, write_checkpoint):
        write_checkpoint(4)
        asked = write_checkpoint(6)
        cut(Path(asked) / "model.safetensors")
        with pytest.raises(ValueError, match=f"{asked} is half-written .*choose an earlier one"):
            find_checkpoint(dataclasses.replace(training, resume_from_checkpoint=asked))

    def test_asked_for_and_missing(self, training):
        with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: there is no folder nowhere"):
            find_checkpoint(dataclasses.replace(training, resume_from_checkpoint="nowhere"))

    def test_trained(self, write_checkpoint):
        assert not is_trained(write_checkpoint(9))
        assert is_trained(write_checkpoint(10))
        assert why_broken(write_checkpoint(10)) is None

    def test_finished(self, training, write_checkpoint, tmp_path):
        checkpoint = write_checkpoint(10)
        run = tmp_path / "run"
        assert not is_finished(training)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(f"{checkpoint}/{name}", run)
        assert not is_finished(training)
        (run / RESULTS_FILE).write_text("{}")
        assert is_finished(training)
        assert not is_finished(dataclasses.replace(training, resume_from_checkpoint=checkpoint))
        cut(run / "model.safetensors")
        assert not is_finished(training)


class TestRecord:
    def record(self, training, resuming, model=None, **data):
        record_arguments(ModelArguments(model=model or {}), DataArguments(**data), training, resuming)

    def test_same_arguments(self, training, tmp_path):
        self.record(training, False, {"projection_dim": 8}, augment_crop=0.5)
        recorded = (tmp_path / "run" / "train_arguments.json").read_text()
        self.record(training, True, {"projection_dim": 8}, augment_crop=0.5)
        assert (tmp_path / "run" / "train_arguments.json").read_text() == recorded
        assert json.loads(recorded)["num_processes"] == 1

    def test_other_arguments(self, training):
        self.record(training, False, {"projection_dim": 8})
        with pytest.raises(ValueError, match="holds a run with num_frames=10, not 3; choose another output_dir"):
            self.record(training, True, {"projection_dim": 8}, num_frames=3)
        with pytest.raises(ValueError, match="model={'projection_dim': 8}, not {'projection_dim': 16}"):
            self.record(training, True, {"projection_dim": 16})
        with pytest.raises(ValueError, match="learning_rate=5e-05, not 1.0"):
            self.record(dataclasses.replace(training, learning_rate=1.0), True, {"projection_dim": 8})

    def test_arguments_that_may_change(self, training, tmp_path):
        self.record(training, False)
        (tmp_path / "run").rename(tmp_path / "moved")
        moved = dataclasses.replace(training, output_dir=str(tmp_path / "moved"), logging_steps=3, disable_tqdm=True)
        self.record(moved, True)

    def test_new_run_forgets_former_results(self, training, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / RESULTS_FILE).write_text("{}")
        self.record(training, False)
        self.record(training, False, num_frames=3)
        assert not (tmp_path / "run" / RESULTS_FILE).exists()
