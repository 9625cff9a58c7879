"""One call for images, clips and text, the calls generic code makes, and what is refused."""

import base64
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from datasets import Image as DatasetsImage
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from processing_rice import MediaError, RicePillowImageProcessor, RiceProcessor, build_processor, open_image
from processing_rice.image_processing_rice import resize_with_pillow


def test_everything_in_one_call(processor, make_picture):
    clip = [make_picture(seed=i) for i in range(6)]
    inputs = processor(
        images=[Image.fromarray(make_picture()), Image.fromarray(make_picture(50, 20))],
        videos=[clip, clip[:2]],
        boxes=[[[0, 0, 0.5, 0.5]] * 6, [None, None]],
        titles=["a red cup", "红色连衣裙"],
        asr=["buy this blue cup", ""],
    )
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    assert inputs["frame_mask"].sum(dim=1).tolist() == [4, 2]
    assert inputs["patch_mask"].shape == (2, 4, 16)
    assert inputs["title_input_ids"].shape == inputs["title_attention_mask"].shape
    assert inputs["asr_attention_mask"].sum(dim=1)[0] > inputs["asr_attention_mask"].sum(dim=1)[1]
    assert set(inputs) <= set(processor.model_input_names)


def test_an_image_and_a_clip_of_it_look_alike(processor, make_picture, tmp_path):
    for size in ((32, 32), (45, 70), (20, 17)):
        picture = Image.fromarray(make_picture(*size))
        inputs = processor(images=[picture], videos=[[picture]])
        torch.testing.assert_close(inputs["pixel_values"], inputs["pixel_values_videos"][:, 0], rtol=1e-4, atol=1e-5)


def test_images_in_any_form(processor, make_picture, tmp_path):
    picture = make_picture()
    path = tmp_path / "shop.png"
    Image.fromarray(picture).save(path)
    expected = processor(images=[Image.fromarray(picture)])["pixel_values"]
    forms = [
        Image.fromarray(picture),
        Image.fromarray(picture).convert("RGBA"),
        path,
        str(path),
        [path],
        [str(path)],
        picture,
        [torch.from_numpy(picture).permute(2, 0, 1)],
    ]
    for form in forms:
        assert torch.equal(processor(images=form)["pixel_values"], expected)
    assert processor(images=[path, picture])["pixel_values"].shape[0] == 2


def test_titles_and_asr_are_tokenised_separately(processor, tokenizer):
    inputs = processor(text="a cup", titles="a red cup", asr=["a green dress", None])
    assert inputs["input_ids"].tolist() == [tokenizer("a cup")["input_ids"]]
    assert inputs["title_input_ids"].tolist() == [tokenizer("a red cup")["input_ids"]]
    assert inputs["asr_attention_mask"].sum(dim=1).tolist() == [len(tokenizer("a green dress")["input_ids"]), 0]
    short = processor(titles=["buy this blue cup " * 50], max_length=8)
    assert short["title_input_ids"].shape == (1, 8)


def test_asr_longer_than_the_limit_keeps_its_middle(processor, tokenizer):
    words = [f"{number}" for number in range(100, 400)]
    inputs = processor(asr=[" ".join(words), "short"], titles=[" ".join(words)])
    kept = tokenizer.decode(inputs["asr_input_ids"][0], skip_special_tokens=True).split()
    assert inputs["asr_input_ids"].shape[1] <= tokenizer.model_max_length
    assert len(kept) > tokenizer.model_max_length / 5
    assert abs(words.index(kept[len(kept) // 2]) - 150) <= 3
    assert tokenizer.decode(inputs["title_input_ids"][0], skip_special_tokens=True).startswith("100 101")
    assert tokenizer.decode(inputs["asr_input_ids"][1], skip_special_tokens=True) == "short"


@pytest.mark.parametrize("blank", ["", " \n", None])
def test_a_blank_text_is_fully_masked(processor, blank):
    for kind in ("titles", "asr"):
        for return_tensors in ("pt", "np", None):
            inputs = processor(**{kind: ["a red cup", blank]}, return_tensors=return_tensors)
            mask = inputs["title_attention_mask" if kind == "titles" else "asr_attention_mask"]
            assert sum(mask[0]) > 0 and sum(mask[1]) == 0


def test_a_title_longer_than_the_limit_is_cut(processor, tokenizer):
    inputs = processor(titles=["buy this blue cup " * 50])
    assert inputs["title_input_ids"].shape[1] == tokenizer.model_max_length


def test_calls_of_generic_code(processor, make_picture):
    """What sentence-transformers and pipelines pass along with every modality."""
    picture, clip = Image.fromarray(make_picture()), np.stack([make_picture(seed=i) for i in range(3)])
    shared = {"padding": True, "return_tensors": "pt", "truncation": True}
    assert processor(images=[picture], **shared)["pixel_values"].shape == (1, 3, 32, 32)
    assert processor(videos=[clip], **shared)["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    assert processor(text=["a cup"], **shared)["input_ids"].shape[0] == 1
    nested = {
        "text_kwargs": {"padding": True, "truncation": True, "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
        "videos_kwargs": {"return_tensors": "pt"},
        "audio_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }
    assert processor(images=[picture], **nested)["pixel_values"].shape == (1, 3, 32, 32)
    assert processor(videos=[clip, clip], **nested)["pixel_values_videos"].shape == (2, 3, 3, 32, 32)
    assert processor(text=["a cup"], **nested)["input_ids"].shape[0] == 1


def test_settings_reach_their_processor(processor, make_picture):
    clip = [make_picture(seed=i) for i in range(6)]
    flat = processor(videos=[clip], num_frames=2)
    nested = processor(videos=[clip], videos_kwargs={"num_frames": 2})
    assert torch.equal(flat["pixel_values_videos"], nested["pixel_values_videos"])
    assert flat["pixel_values_videos"].shape[1] == 2
    raw = processor(images=clip[0], images_kwargs={"do_normalize": False, "do_rescale": False})
    assert raw["pixel_values"].max() > 10


def test_arrays_can_be_returned(processor, make_picture):
    inputs = processor(images=make_picture(), videos=[make_picture()], titles=["a cup"], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "There is nothing to process"),
        ({"images": "picture", "boxes": [[None]]}, "`boxes` belong to the frames of `videos`"),
        ({"images": "picture", "num_frame": 3}, "Unknown argument 'num_frame'"),
        ({"titles": ["a"], "colour": "red"}, "Unknown argument 'colour'"),
        ({"videos": "clip", "num_frame": 3}, "Unknown argument 'num_frame'"),
        ({"videos": [[]]}, "Clip 0 has no frames"),
        ({"videos": []}, "`videos` is empty"),
        ({"videos": "clip", "boxes": [[None]]}, "2 frames but 1 entries in `boxes`"),
        ({"images": "picture", "titles": ["a", "b"]}, "`titles` has 2 entries for 1 images or clips"),
        ({"videos": "clip", "asr": []}, "`asr` has 0 entries for 1 images or clips"),
    ],
)
def test_bad_calls_get_one_sentence(processor, make_picture, arguments, message):
    stand_ins = {"picture": make_picture(), "clip": [[make_picture(), make_picture()]]}
    arguments = {
        name: stand_ins.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message) as error:
        processor(**arguments)
    assert "\n" not in str(error.value)


def test_save_and_load(tmp_path, processor, make_picture):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is RiceProcessor
    clip = [make_picture(seed=i) for i in range(6)]
    arguments = {"images": clip[0], "videos": [clip], "boxes": [[[0, 0, 0.3, 0.3]] * 6], "titles": ["a 红色 cup"]}
    ours, theirs = processor(**arguments), loaded(**arguments)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("image_size, patch_size, patches", [(32, 8, 16), (48, 16, 9)])
def test_build_processor_fits_the_encoder(tokenizer, make_picture, image_size, patch_size, patches):
    processor = build_processor(tokenizer, image_size, patch_size, num_frames=2)
    frames = [make_picture(seed=i) for i in range(3)]
    inputs = processor(images=frames[0], videos=[frames], boxes=[[[0, 0, 1, 1]] * 3])
    assert inputs["pixel_values"].shape == (1, 3, image_size, image_size)
    assert inputs["pixel_values_videos"].shape == (1, 2, 3, image_size, image_size)
    assert inputs["patch_mask"].shape == (1, 2, patches)


def test_pictures_are_stretched_not_cropped(processor):
    picture = np.zeros((20, 80, 3), dtype=np.uint8)
    picture[:, -20:] = 255
    pixels = processor(images=Image.fromarray(picture))["pixel_values"][0]
    assert pixels[0, 16, -1] > 1.5 and pixels[0, 16, 0] < -1.5
    torch.testing.assert_close(pixels[:, 0], pixels[:, -1], rtol=0, atol=0.02)


def test_pillow_resizing_survives_saving(make_picture, processor, tmp_path):
    exact = build_processor(processor.tokenizer, image_size=32, patch_size=8, resize_backend="pillow")
    exact.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is RicePillowImageProcessor
    for size in ((61, 90), (90, 61), (90, 40)):
        picture = Image.fromarray(make_picture(*size))
        expected = np.asarray(resize_with_pillow(picture, (32, 32), Image.BICUBIC)).astype(np.float32)
        for each in (exact, loaded):
            inputs = each(images=[picture], videos=[[picture]])
            torch.testing.assert_close(inputs["pixel_values"], inputs["pixel_values_videos"][:, 0], rtol=0, atol=1e-5)
            mean, std = (
                torch.tensor(list(v))[:, None, None]
                for v in (each.image_processor.image_mean, each.image_processor.image_std)
            )
            levels = (inputs["pixel_values"][0] * std + mean) * 255
            assert np.abs(levels.permute(1, 2, 0).numpy() - expected).max() < 0.01


_LOAD_ELSEWHERE = """
import sys, numpy as np, torch
from datasets import Dataset
from datasets import Image as DatasetsImage
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "processing_rice" not in sys.modules
picture = Image.open(sys.argv[2])
torch.save(processor(images=[picture])["pixel_values"], sys.argv[3])
"""


def test_pillow_resizing_is_saved_in_the_folder(make_picture, processor, tmp_path):
    """Into a process where this project is not importable."""
    exact = build_processor(processor.tokenizer, image_size=32, patch_size=8, resize_backend="pillow")
    folder, picture, result = tmp_path / "saved", tmp_path / "picture.png", tmp_path / "pixels.pt"
    exact.save_pretrained(folder)
    Image.fromarray(make_picture(90, 40)).save(picture)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", _LOAD_ELSEWHERE, str(folder), str(picture), str(result)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pixels = torch.load(result, weights_only=True)
    assert torch.equal(pixels, exact(images=[Image.open(picture)])["pixel_values"])


def test_picture_files_are_read_upright_and_named_in_errors(make_picture, processor, tmp_path):
    stored = Image.fromarray(make_picture(20, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    opened = open_image(tmp_path / "turned.png")
    assert np.array_equal(opened, upright)
    assert np.array_equal(open_image((tmp_path / "turned.png").read_bytes()), upright)
    for path in (tmp_path / "turned.png", str(tmp_path / "turned.png")):
        assert torch.equal(processor(images=path)["pixel_values"], processor(images=upright)["pixel_values"])

    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    for read in (open_image, lambda path: processor(images=[path]), lambda path: processor(videos=[[path]])):
        with pytest.raises(MediaError, match=r"torn\.jpg cannot be decoded .*; replace it or leave it out") as error:
            read(tmp_path / "torn.jpg")
        assert isinstance(error.value, ValueError)
        with pytest.raises(MediaError, match=r"There is no image file .*absent\.jpg") as error:
            read(tmp_path / "absent.jpg")
        assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"There is no image file .*absent\.jpg"):
        processor(images=[str(tmp_path / "absent.jpg")])
    with pytest.raises(MediaError, match="The image file <bytes> cannot be decoded"):
        open_image(b"")
    with pytest.raises(MediaError, match="The image file 3/cup cannot be decoded"):
        open_image(b"no picture", name="3/cup")


def test_pictures_of_a_list_are_checked_one_by_one(processor, make_picture):
    picture = make_picture()
    expected = processor(images=[picture])["pixel_values"]
    for images in ([picture, picture / 255, Image.fromarray(picture)], [(picture / 255).astype(np.float32), picture]):
        for return_tensors in ("pt", "np"):
            pixels = processor(images=images, return_tensors=return_tensors)["pixel_values"]
            assert pixels.shape[0] == len(images)
            # Floats are not rounded to 8 bits in between.
            assert np.abs(np.asarray(pixels) - np.asarray(expected)).max() < 0.03
    for bad in (picture.astype(np.float32), picture.astype(np.uint16), picture > 9):
        with pytest.raises(ValueError, match=r"Image 1 must hold uint8 or floats in 0\.\.1"):
            processor(images=[picture, bad])
        with pytest.raises(ValueError, match=r"Clip 0, frame 1 must hold uint8 or floats in 0\.\.1"):
            processor(videos=[[picture, bad]])
    settings = {"images_kwargs": {"do_rescale": False, "do_normalize": False}}
    whole, floats = (processor(images=[form], **settings)["pixel_values"] for form in (picture, picture.astype(float)))
    assert (whole - floats).abs().max() < 1.5


def test_files_in_any_form_and_pictures_that_were_opened(processor, make_picture, tmp_path):
    """Turned by a tag, and with a colour under what is transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(make_picture()).convert("RGBA")
    picture.paste((0, 255, 0, 0), (0, 0, 20, 10))
    picture.save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    expected = processor(images=[open_image(tmp_path / "a.png")])["pixel_values"]
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    path = str(tmp_path / "a.png")
    forms = (data, {"path": path}, {"path": None, "bytes": data}, Image.open(path), address)
    for form in forms:
        assert torch.equal(processor(images=form)["pixel_values"], expected)
        assert torch.equal(processor(images=[[form]])["pixel_values"], expected)
    for form in forms[:-1]:
        clip = processor(videos=[[form]])["pixel_values_videos"][0]
        torch.testing.assert_close(clip, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "`images` is empty; give at least one image"),
        ([[]], "`images` is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), "`images` is empty"),
        ("shop/mug", "There is no image file shop/mug"),
        ("mug", "There is no image file mug"),
        ("http://127.0.0.1:9/mug.png", "The image file http://127.0.0.1:9/mug.png cannot be fetched"),
        ({"path": None}, "The image entry with the keys 'path' has neither bytes nor a path"),
        (3, "Image 0 must"),
        ([None], "Image 0 must"),
    ],
)
def test_arguments_that_name_no_picture(processor, images, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(images=images)
    assert "\n" not in str(error.value)


def test_images_in_any_sequence(processor, make_picture, tmp_path):
    """The column of a data set or a table, an array of paths, an iterator: what texts may come in."""
    pictures = [Image.fromarray(make_picture(seed=i)) for i in range(3)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    expected = processor(images=pictures)["pixel_values"]
    column = Dataset.from_dict({"image": pictures}).cast_column("image", DatasetsImage())["image"]
    for images in (column, pd.Series(pictures), np.array([str(path) for path in paths]), iter(pictures)):
        assert torch.equal(processor(images=images)["pixel_values"], expected)
    with pytest.raises(ValueError, match="`images` is a set, which has no order; give a list"):
        processor(images=set(paths))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"titles": []}, "`titles` is empty; give at least one text"),
        ({"text": []}, "`text` is empty"),
        ({"images": {"image": "a.png"}}, "entry with the keys 'image' has neither bytes nor a path"),
        ({"images": np.full((4, 4, 3), np.nan), "do_rescale": False}, "Image 0 must hold finite numbers"),
        ({"videos": [np.full((1, 4, 4, 3), np.inf)], "do_rescale": False}, "Clip 0, frame 0 must hold finite numbers"),
    ],
    ids=str,
)
def test_empty_arguments_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)
