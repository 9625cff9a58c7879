"""Models to start from, checkpoints to continue from, and the record of a run's arguments."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel

from modeling_rice import RiceConfig, RiceModel
from training_rice.arguments import DataArguments, ModelArguments
from training_rice.checkpoints import RESULTS_FILE
from training_rice.setup import (
    build_model,
    build_rice_processor,
    check_processes,
    check_recomputation,
    choose_attention,
    load_views,
    read_texts,
    record_arguments,
)


@pytest.fixture
def saved(make_model, processor, tmp_path):
    """A saved RICE checkpoint with its processor."""
    folder = tmp_path / "rice"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_missing_test_files_suggest_training_without_validation(training, tmp_path):
    annotations = tmp_path / "lpr4m" / "annotations"
    annotations.mkdir(parents=True)
    rows = ("\t".join((f"0-0-0-0-0-{i}-{i + 1}", f"['f{i}']", "[]", f"image{i}", *[""] * 7)) for i in range(16))
    (annotations / "training_videoinfo.txt").write_text("\n".join(rows))
    data = DataArguments(dataset="lpr4m", data_dir=str(annotations.parent), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="set validation_fraction .* Set eval_strategy to 'no' to train"):
        load_views(data, dataclasses.replace(training, eval_strategy="epoch"))


@pytest.fixture
def clips(tmp_path):
    """The clips of a shop folder, the same in training and validation: what is said, by clip id."""
    for name in ("mug", "hat"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    gallery = [{"gallery_id": name, "image": f"{name}.png", "title": name} for name in ("mug", "hat")]
    clips = [
        {"query_id": f"c{i}", "frames": [f"{name}.png"], "gt_gallery_ids": [name], "asr": f"a {name}"}
        for i, name in enumerate(("mug", "hat") * 8)
    ]
    for name, rows in (("gallery", gallery), ("clips_train", clips), ("clips_val", clips)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return clips


def test_validation_may_have_boxes_of_its_own(clips, training, tmp_path):
    lines = [{"format": "rice-boxes", "version": 1, "dataset": "shop_clips"}]
    lines += [
        {"split": "validation", "clip_id": clip["query_id"], "num_frames": 1, "frames": [0],
         "boxes": [[0.0, 0.0, 0.5, 0.5]], "scores": [0.9]}
        for clip in clips
    ]  # fmt: skip
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"use_boxes": True, "validation_boxes_file": str(tmp_path / "boxes.jsonl")}
    data = DataArguments(dataset=str(tmp_path), cache_dir=str(tmp_path / "cache"), **settings)
    pairs, (queries, _, _) = load_views(data, dataclasses.replace(training, eval_strategy="epoch"))
    assert all(boxes == [[0.0, 0.0, 0.5, 0.5]] for boxes in queries["boxes"]) and len(queries) == 16
    assert not any(box for boxes in pairs["boxes"] for box in boxes or [])
    with pytest.raises(ValueError, match="validation_boxes_file goes with use_boxes"):
        DataArguments(dataset="mini_lpr4m", validation_boxes_file="boxes.jsonl")


def test_validation_clips_have_as_noisy_asr_as_training_pairs(clips, training, tmp_path):
    training = dataclasses.replace(training, eval_strategy="epoch")

    def validation_asr(**settings) -> list[str]:
        data = DataArguments(dataset=str(tmp_path), cache_dir=str(tmp_path / "cache"), **settings)
        pairs, (queries, _, _) = load_views(data, training)
        assert list(pairs["asr"]) == [clip["asr"] for clip in clips]
        return list(queries["asr"])

    own = validation_asr(use_text=True)
    assert own == validation_asr(asr_noise=1.0) == [clip["asr"] for clip in clips]
    noisy = validation_asr(use_text=True, asr_noise=1.0)
    other = {"a mug": "a hat", "a hat": "a mug"}
    assert noisy == validation_asr(use_text=True, asr_noise=1.0) and {"", "a hat", "a mug"} == set(noisy)
    assert all(text in ("", other[before]) for text, before in zip(noisy, own, strict=True))


def cut(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class TestProcesses:
    def test_several_unconnected_processes(self, training, monkeypatch):
        check_processes(training)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes were started, but this one sees 1; .*ACCELERATE_USE_CPU"):
            check_processes(training)

    def test_several_gpus_of_one_process(self):
        with pytest.raises(ValueError, match="one process sees 4 GPUs.*--num_processes 4"):
            check_processes(SimpleNamespace(world_size=1, n_gpu=4, fsdp=[]))

    def test_sharded(self, training, monkeypatch):
        with pytest.raises(ValueError, match="fsdp: the model's temperature is a scalar"):
            check_processes(SimpleNamespace(world_size=1, n_gpu=1, fsdp=["full_shard"]))
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="train data parallel, with grad_cache_chunk"):
            check_processes(training)


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

    def test_the_ranking_of_a_checkpoint_is_chosen_again(self, make_model, tmp_path):
        model = make_model(fusion_weight=0.5, ranking="fused")
        model.save_pretrained(tmp_path / "fused")
        for changes in ({"use_decoder": False}, {"fusion_weight": None}, {}):
            kept = build_model(ModelArguments(model_name_or_path=str(tmp_path / "fused"), model=changes))
            assert kept.config.ranking is None
        chosen = build_model(ModelArguments(model_name_or_path=str(tmp_path / "fused"), model={"ranking": "matching"}))
        assert chosen.config.ranking == "matching"

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

    def test_truncated_checkpoint(self, saved):
        cut(saved / "model.safetensors")
        with pytest.raises(ValueError, match="model.safetensors is cut short"):
            build_model(ModelArguments(model_name_or_path=str(saved), model={}))

    def test_checkpoint_of_another_model(self, clip_vision_config, tmp_path):
        CLIPVisionModel(clip_vision_config).save_pretrained(tmp_path / "clip")
        with pytest.raises(ValueError, match="holds a clip_vision_model model, not a RICE checkpoint"):
            build_model(ModelArguments(model_name_or_path=str(tmp_path / "clip"), model={}))

    def test_two_starting_points(self, saved):
        with pytest.raises(ValueError, match="pass one of them"):
            build_model(ModelArguments(model_name_or_path=str(saved), init_vision_from=str(saved), model={}))


class TestAttention:
    @pytest.mark.parametrize(
        ("asked", "bf16", "device", "expected"),
        [
            (None, True, "cpu", "eager"),
            (None, False, "cpu", "sdpa"),
            (None, True, "cuda", "sdpa"),
            ("sdpa", True, "cpu", "sdpa"),
            ("eager", False, "cpu", "eager"),
        ],
    )
    def test_bf16_on_a_cpu_is_eager_unless_asked_otherwise(self, make_model, asked, bf16, device, expected):
        model = make_model()
        training = SimpleNamespace(bf16=bf16, device=torch.device(device))
        choose_attention(model, ModelArguments(attn_implementation=asked), training)
        assert model.config._attn_implementation == expected
        assert model.vision_model.config._attn_implementation == expected

    def test_an_encoder_without_sdpa_uses_a_supported_back_end(self, resnet_settings):
        model = RiceModel(RiceConfig(**resnet_settings))
        training = SimpleNamespace(bf16=False, device=torch.device("cpu"))
        for name in ("eager", "sdpa"):
            choose_attention(model, ModelArguments(attn_implementation=name), training)
            configs = model.config, model.vision_model.config
            assert [config._attn_implementation for config in configs] == [name, "eager"]

    def test_activations_are_recomputed_if_the_encoder_supports_it(self, make_model, resnet_settings):
        asked = SimpleNamespace(activation_checkpointing=True, gradient_checkpointing=False)
        check_recomputation(make_model(), asked)
        model = RiceModel(RiceConfig(**resnet_settings))
        check_recomputation(model, SimpleNamespace(gradient_checkpointing=None))
        for training in (asked, SimpleNamespace(gradient_checkpointing=True)):
            with pytest.raises(ValueError, match="the encoder 'resnet' cannot recompute its activations; leave it"):
                check_recomputation(model, training)

    def test_unknown(self, make_model):
        training = SimpleNamespace(bf16=False, device=torch.device("cpu"))
        with pytest.raises(ValueError, match="attn_implementation 'fast' cannot be used") as error:
            choose_attention(make_model(), ModelArguments(attn_implementation="fast"), training)
        assert "\n" not in str(error.value)


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

    def test_values_without_a_json_form(self, training, tmp_path):
        self.record(dataclasses.replace(training, max_grad_norm=float("inf")), False)
        text = (tmp_path / "run" / "train_arguments.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail)["max_grad_norm"] == "Infinity"
        self.record(dataclasses.replace(training, max_grad_norm=float("inf")), True)
        with pytest.raises(ValueError, match="weight_decay must be a number, got nan"):
            self.record(dataclasses.replace(training, weight_decay=float("nan")), False)

    def test_arguments_that_may_change(self, training, tmp_path):
        self.record(training, False)
        (tmp_path / "run").rename(tmp_path / "moved")
        moved = dataclasses.replace(training, output_dir=str(tmp_path / "moved"), logging_steps=3, disable_tqdm=True)
        self.record(moved, True)

    def test_new_run_removes_previous_results(self, training, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / RESULTS_FILE).write_text("{}")
        self.record(training, False)
        self.record(training, False, num_frames=3)
        assert not (tmp_path / "run" / RESULTS_FILE).exists()
