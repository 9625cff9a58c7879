import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_rice import pretrained_baselines as baselines
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, retrieve
from evaluation_rice.speed import TimedRetriever

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
TEXT = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8}


def build(name):
    """An untrained model of a family with its image processor."""
    import transformers as t

    if name == "clip":
        config = t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
        return t.CLIPModel(config), t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    if name == "siglip":
        config = t.SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 16})
        return t.SiglipModel(config), t.SiglipImageProcessor(size={"height": 32, "width": 32})
    if name == "siglip2":
        vision = {**SMALL, "patch_size": 8, "num_patches": 16}
        config = t.Siglip2Config(vision_config=vision, text_config={**TEXT, "projection_size": 16})
        return t.Siglip2Model(config), t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    if name == "dinov3":
        return t.DINOv3ViTModel(t.DINOv3ViTConfig(**VISION)), t.ViTImageProcessor(size={"height": 32, "width": 32})
    if name == "swin":
        config = t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        return t.SwinModel(config), t.ViTImageProcessor(size={"height": 32, "width": 32})
    clip = {**VISION, "num_frames": 4}
    processor = t.VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if name == "timesformer":
        return t.TimesformerModel(t.TimesformerConfig(**clip)), processor
    return t.VideoMAEModel(t.VideoMAEConfig(**clip, tubelet_size=2)), processor


def save(name, folder):
    torch.manual_seed(0)
    model, processor = build(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def encoder(tmp_path):
    def load(name, **options):
        model, processor, _ = baselines.load_pretrained(save(name, tmp_path / name))
        return baselines.FrozenEncoder(model, processor, **options)

    return load


def picture(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


FAMILIES = ["clip", "siglip", "siglip2", "dinov3", "swin", "timesformer", "videomae"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_ranks_under_the_protocol(name, encoder, shop):
    retriever = TimedRetriever(encoder(name, batch_size=3))
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    rankings, failures = retrieve(retriever, task, shop.queries, shop.gallery, loading=Loading(2, quiet=True))
    assert failures == [] and list(rankings) == ["embedding"]
    found = list(rankings["embedding"].rankings.values())
    assert [len(ranking) for ranking in found] == [len(task.gallery_of(i)) for i in range(len(found))]
    assert len(set(map(tuple, found))) > 1
    speed = retriever.summary()
    assert speed["clip_ms"] > 0 and speed["image_ms"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_features_do_not_depend_on_the_batch_and_have_length_one(name, encoder):
    retriever = encoder(name)
    clips = [[picture(0), picture(1)], [picture(2)], [picture(3), picture(4), picture(5)]]
    together = retriever.encode_clips(retriever._prepare(clips))
    alone = np.concatenate([retriever.encode_clips(retriever._prepare([clip])) for clip in clips])
    retriever.batch_size = 1
    one_by_one = retriever.encode_clips(retriever._prepare(clips))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_clip_is_the_mean_of_its_frames_features(encoder):
    """Against CLIP's own call, frame by frame."""
    retriever = encoder("clip")
    frames = [picture(0), picture(1)]
    features = []
    for frame in frames:
        output = retriever.model.get_image_features(**retriever.processor(frame, return_tensors="pt")).pooler_output
        features.append(output[0].detach().numpy() / np.linalg.norm(output[0].detach().numpy()))
    mean = np.mean(features, axis=0)
    clip = retriever.encode_clips(retriever._prepare([frames]))
    np.testing.assert_allclose(clip[0], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("name", ["timesformer", "videomae"])
def test_an_image_becomes_a_clip_of_identical_frames(name, encoder):
    retriever = encoder(name)
    assert retriever.num_frames == 4
    image = retriever.encode_gallery(retriever._prepare([[picture(0)]]))
    clip = retriever.encode_clips(retriever._prepare([[picture(0)] * 4]))
    moving = retriever.encode_clips(retriever._prepare([[picture(i) for i in range(4)]]))
    np.testing.assert_allclose(image, clip, atol=1e-6)
    assert not np.allclose(image, moving, atol=1e-3)


def test_frames_of_one_batch_may_differ_in_size(encoder):
    retriever = encoder("videomae")
    clips = [[picture(0), picture(1)], [picture(2, (60, 32)), picture(3, (60, 32))]]
    assert retriever.encode_clips(retriever._prepare(clips)).shape == (2, 16)


def test_frames_are_repeated_in_time_order():
    assert baselines.spread(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert baselines.spread(1, 4) == [0, 0, 0, 0]
    assert baselines.spread(8, 8) == list(range(8))
    assert baselines.spread(16, 4) == [0, 4, 8, 12]


def test_frames_are_cropped_to_boxes(encoder, shop):
    cut, whole = encoder("clip", use_boxes=True), encoder("clip")
    row = shop.queries[0]
    assert [frame.size for frame in cut._frames(row, [])] == [(12, 16)]
    assert [frame.size for frame in whole._frames(row, [])] == [(24, 16), (24, 16)]


def test_the_text_tower_is_not_counted(encoder):
    retriever = encoder("clip")
    visual = sum(p.numel() for p in retriever.model.vision_model.parameters())
    assert retriever.num_parameters() == visual + retriever.model.visual_projection.weight.numel()
    swin = encoder("swin")
    assert swin.num_parameters() == sum(p.numel() for p in swin.model.parameters())


def test_an_untrained_pooler_is_not_used(tmp_path):
    """Published classifiers come without a pooler, which would then be random."""
    import transformers as t

    torch.manual_seed(0)
    model = t.ViTModel(t.ViTConfig(**VISION), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "vit")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    loaded, processor, untrained = baselines.load_pretrained(str(tmp_path / "vit"))
    assert untrained
    retriever = baselines.FrozenEncoder(loaded, processor, untrained_pooler=untrained)
    inputs = processor(picture(0), return_tensors="pt")
    expected = model.eval()(**inputs).last_hidden_state[0, 0].detach().numpy()
    found = retriever.encode_gallery(retriever._prepare([[picture(0)]]))[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)


def test_unreadable_files_are_named(encoder, shop):
    path = shop.queries[0]["frames"][0]["path"]
    with open(path, "wb") as file:
        file.write(b"no image")
    retriever = encoder("clip")
    _, loaded, failures = retriever.load_clips([shop.queries[0], shop.queries[1]])
    assert loaded == [0, 1] and failures[0]["file"] == path and failures[0]["outcome"] == "left out"


def test_names_and_models():
    assert baselines.choose_model("clip", None) == ("clip", "openai/clip-vit-base-patch32")
    assert baselines.choose_model("clip", "me/mine") == ("clip", "me/mine")
    assert baselines.choose_model("me/mine", None) == (None, "me/mine")
    with pytest.raises(ValueError, match="no baseline 'magic': name color_histogram"):
        baselines.choose_model("magic", None)
    with pytest.raises(ValueError, match="--baseline_model goes with a family"):
        baselines.choose_model("me/mine", "me/other")
    with pytest.raises(ValueError, match="chance is computed"):
        baselines.load_baseline("chance")
    with pytest.raises(ValueError, match="add --boxes ground_truth"):
        baselines.load_baseline("color_histogram_in_box")


def test_the_wrong_models_are_refused(tmp_path):
    folder = save("swin", tmp_path / "swin")
    with pytest.raises(ValueError, match="'swin' does not belong to --baseline clip"):
        baselines.load_pretrained(folder, "clip")
    os.remove(os.path.join(folder, "preprocessor_config.json"))
    with pytest.raises(ValueError, match="has no image processor"):
        baselines.load_pretrained(folder)
    (tmp_path / "rice").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "rice" / name).write_bytes((tmp_path / "swin" / name).read_bytes())
    config = json.loads((tmp_path / "rice" / "config.json").read_text())
    config |= {"model_type": "vivit", "num_frames": 4}
    (tmp_path / "rice" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="only timesformer and videomae are supported"):
        baselines.load_pretrained(str(tmp_path / "rice"))
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        baselines.load_pretrained("openai/clip-vit-base-patch32")


def test_lost_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("clip", tmp_path / "clip")
    weights = load_file(os.path.join(folder, "model.safetensors"))
    weights.pop("visual_projection.weight")
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of its model, such as visual_projection.weight"):
        baselines.load_pretrained(folder)


def test_a_network_of_timm_is_called_by_its_architecture(tmp_path):
    pytest.importorskip("timm")
    import transformers as t

    architecture = "mobilenetv3_small_050"
    config = t.TimmWrapperConfig(architecture=architecture, num_classes=0)
    model = t.TimmWrapperModel(config).eval()
    model.save_pretrained(tmp_path)
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    retriever, entry = baselines.load_baseline(str(tmp_path))
    assert entry == {"name": architecture, "model": str(tmp_path)}
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(retriever._features({"pixel_values": pixels}), model(pixels).pooler_output)
