"""A model whose encoder onnxruntime runs encodes and ranks as the model does, through every command."""

import json
import shutil

import pytest
import torch
from PIL import Image

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
pytest.importorskip("lancedb", reason="needs the extra index")

from hub_rice.export.onnx_encoder import with_towers  # noqa: E402
from hub_rice.export.onnx_export import export  # noqa: E402
from hub_rice.precision import precision_of  # noqa: E402
from modeling_rice import RiceConfig, RiceModel  # noqa: E402
from processing_rice import build_processor, train_tokenizer  # noqa: E402
from retrieval_rice.index import GalleryIndex  # noqa: E402
from rice_cli import main  # noqa: E402

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
CLIP |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TEXT = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 64}
VARIANTS = {
    "clip": {"vision_config": CLIP, "fusion_weight": 0.5},
    "text": {"vision_config": CLIP, "text_config": TEXT, "text_score_weight": 0.5},
    "inner layer": {"vision_config": CLIP, "vision_feature_layer": 1},
    "resnet": {"vision_config": RESNET, "use_decoder": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory):
    """A folder with a checkpoint and its export, and ten pictures."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    model = RiceModel(RiceConfig(projection_dim=16, decoder_num_heads=2, **VARIANTS[request.param])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and parameter.dim() > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    processor = build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400), 32, 16, 3)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    export(model, processor, folder / "onnx", int8=True, quiet=True)
    (folder / "pictures").mkdir()
    for number in range(10):
        noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(number)).byte()
        Image.fromarray(noise.numpy()).resize((40, 40)).save(folder / "pictures" / f"{number}.png")
    return folder, processor


def load(folder) -> RiceModel:
    return RiceModel.from_pretrained(folder / "model").eval()


def pictures(folder) -> list[str]:
    return sorted(map(str, (folder / "pictures").iterdir()))


def test_encodings_scores_and_fingerprint_are_those_of_torch(exported):
    folder, processor = exported
    plain, model = load(folder), with_towers(load(folder), folder / "onnx")
    assert precision_of(model) == "fp32" and model.fingerprint() == plain.fingerprint()
    files = pictures(folder)
    titles, asr = ["red mug"] * 10, ["a shoe", "mug"]
    images = processor(images=files, titles=titles)
    clips = processor(videos=[files[:3], files[4:5]], asr=asr)
    expected, found = ((m.encode_clips(**clips), m.encode_gallery(**images)) for m in (plain, model))
    for one, other in zip(expected, found):
        for name in one.fields:
            if getattr(one, name) is not None:
                torch.testing.assert_close(getattr(other, name).float(), getattr(one, name).float(), atol=1e-4, rtol=0)
    # Encodings of both may be compared with each other.
    torch.testing.assert_close(model.similarity(expected[0], found[1]), plain.similarity(*expected), atol=1e-4, rtol=0)


def test_the_quantised_encoder_has_its_own_fingerprint(exported):
    folder, processor = exported
    plain, model = load(folder), with_towers(load(folder), folder / "onnx", int8=True)
    assert precision_of(model) == "int8" and model.fingerprint() == f"{plain.fingerprint()}-int8"
    images = processor(images=pictures(folder), titles=["red mug"] * 10)
    expected, found = plain.encode_gallery(**images), model.encode_gallery(**images)
    assert torch.nn.functional.cosine_similarity(expected.embeds, found.embeds).min() > 0.98
    with pytest.raises(ValueError, match="`gallery` was encoded by another model"):
        plain.similarity(plain.encode_clips(**processor(videos=[pictures(folder)[:1]])), found)


def test_the_commands_accept_exported_encoders(exported, tmp_path, capsys):
    folder, _ = exported
    towers = ["--model", str(folder / "model"), "--towers", str(folder / "onnx")]
    indexes = {}
    for precision in ("fp32", "int8"):
        indexes[precision] = str(tmp_path / precision)
        words = ["index", str(folder / "pictures"), *towers, "--output", indexes[precision], "--num_workers", "0"]
        assert main([*words, "--precision", precision]) == 0
        assert f"the model computes in {precision} (" in capsys.readouterr().err
    found = {"fp32": "float32", "int8": "int8"}
    for precision, model in (("fp32", load(folder)), ("int8", with_towers(load(folder), folder / "onnx", int8=True))):
        assert GalleryIndex.load(indexes[precision], model).precision == found[precision]
    words = ["recognise", str(folder / "pictures"), *towers, "--shop"]
    assert main([*words, indexes["fp32"], "--jsonl", "-"]) == 0
    with_onnx = capsys.readouterr().out
    assert main([*words[:4], "--shop", indexes["fp32"], "--jsonl", "-", "--precision", "fp32", "--device", "cpu"]) == 0
    lines = [[json.loads(line) for line in text.splitlines()] for text in (with_onnx, capsys.readouterr().out)]
    assert [[one["image_id"] for one in segments] for segments in lines][0] == [one["image_id"] for one in lines[1]]
    with pytest.raises(SystemExit):
        main([*words, indexes["int8"]])
    assert "was encoded by another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "bf16"], "--precision bf16: --towers support fp32 and int8 only."),
        (["--device", "cuda"], "--device cuda: --towers run on the CPU"),
        (["--detector", "somewhere"], "--detector: --towers do not support boxes"),
    ],
)
def test_options_that_do_not_go_together(exported, capsys, options, words):
    folder, _ = exported
    with pytest.raises(SystemExit) as ended:
        main(
            ["recognise", str(folder), "--shop", str(folder), "--model", str(folder / "model"), "--towers",
             str(folder / "onnx"), *options]
        )  # fmt: skip
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_boxes_are_refused(exported):
    folder, processor = exported
    model = with_towers(load(folder), folder / "onnx")
    clips = processor(videos=[pictures(folder)[:1]], boxes=[[[0.0, 0.0, 0.5, 0.5]]])
    with pytest.raises(ValueError, match="takes no boxes"):
        model.encode_clips(**clips)


def test_towers_of_another_model_old_ones_and_damaged_ones_are_refused(exported, tmp_path):
    folder, _ = exported
    other = load(folder)
    with torch.no_grad():
        other.visual_projection.weight.mul_(1.5)
    with pytest.raises(ValueError, match="was exported from another model"):
        with_towers(other, folder / "onnx")
    with pytest.raises(FileNotFoundError, match="rice export MODEL_DIR"):
        with_towers(load(folder), tmp_path)
    shutil.copytree(folder / "onnx", tmp_path / "onnx")
    about = json.loads((folder / "onnx" / "onnx.json").read_text())
    (tmp_path / "onnx" / "encoder.onnx").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        with_towers(load(folder), tmp_path / "onnx")
    (tmp_path / "onnx" / "encoder_int8.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="export again with --int8"):
        with_towers(load(folder), tmp_path / "onnx", int8=True)
    without = {**about, "parts": {name: part for name, part in about["parts"].items() if name != "encoder"}}
    elsewhere = {**about, "parts": {"encoder": {"file": "../encoder.onnx"}}}
    for text, error in (
        (json.dumps(without), "has no encoder: export again"),
        (json.dumps(elsewhere), "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
    ):
        (tmp_path / "onnx" / "onnx.json").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            with_towers(load(folder), tmp_path / "onnx")
