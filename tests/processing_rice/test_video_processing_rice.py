"""Frames in any form give the same pixels; sampling, masks and boxes follow them; bad input gets one sentence."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoVideoProcessor

from processing_rice import RiceVideoProcessor, boxes_to_patch_mask, build_processor, sample_frame_indices
from processing_rice.image_processing_rice import resize_with_pillow

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


@pytest.fixture
def video_processor():
    return RiceVideoProcessor(size={"height": 32, "width": 32}, patch_size=8, num_frames=4)


def grey_levels(pixels):
    """Normalised pixels -> 0..255."""
    return (pixels * STD + MEAN) * 255


def test_patch_mask_by_hand():
    # Pixels 8..15 in both directions: the cell of row 1, column 1, and one counted end pixel of its neighbours.
    assert boxes_to_patch_mask([[8, 8, 15, 15]], 32, 8, 0.5).nonzero().flatten().tolist() == [5]
    # Inter 9, union 81 + 64 - 9: the cell left of the box shares its border column only, IoU 0.062.
    sharing = boxes_to_patch_mask([[8, 8, 15, 15]], 32, 8, 0.05).reshape(4, 4)
    assert sharing.nonzero().tolist() == [[0, 1], [1, 0], [1, 1]]
    two = boxes_to_patch_mask([[0, 0, 7, 7], [24, 24, 31, 31]], 32, 8, 0.5)
    assert two.nonzero().flatten().tolist() == [0, 15]


def test_a_box_that_selects_nothing_or_no_box_keeps_everything():
    assert boxes_to_patch_mask([[100, 100, 120, 120]], 32, 8).all()
    assert boxes_to_patch_mask([], 32, 8).all() and len(boxes_to_patch_mask([], 32, 8)) == 16
    assert boxes_to_patch_mask(torch.tensor([[0.0, 0.0, 31.0, 31.0]]), 32, 8).all()


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3]]])
def test_boxes_of_another_shape_are_refused(boxes):
    with pytest.raises(ValueError, match=r"must be \(n, 4\)"):
        boxes_to_patch_mask(boxes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[0, 0, np.nan, 4]],), "`boxes` must be finite"),
        (([[0, 0, 4, 4], [1]],), r"`boxes` must be \(n, 4\)"),
        (([[0, 0, 4, 4]], 32, 0), "`patch_size` must be at least 1 .* 32 x 32 pixels, got 0"),
        (([[0, 0, 4, 4]], (32, 16), 24), "fit into the image of 32 x 16 pixels, got 24"),
    ],
)
def test_invalid_patch_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        boxes_to_patch_mask(*arguments)


@pytest.mark.parametrize(
    "box, message",
    [
        ([0, 0, np.nan, 1], "is not left-top-right-bottom in finite numbers"),
        ([0, 0, 1], "is not left-top-right-bottom in finite numbers"),
        ([[0, 0, 1, 1], [0, 0]], "is not left-top-right-bottom in finite numbers"),
        (["a", 0, 1, 1], "is not left-top-right-bottom in finite numbers"),
        ([8, 8, 120, 64], r"is not in 0\.\.1 of the frame"),
        ([-0.2, 0, 0.5, 1], r"is not in 0\.\.1 of the frame"),
        ([0.5, 0, 0.5, 1], "has no area in the frame"),
        ([0, 0.6, 1, 0.4], "has no area in the frame"),
        ([-0.04, 0, -0.01, 1], "has no area in the frame"),
        ([[0, 0, 1, 1], [0, 0, 0, 0]], "has no area in the frame"),
    ],
)
def test_invalid_boxes_are_refused_with_clip_and_frame(video_processor, make_picture, box, message):
    clips = [[make_picture()], [make_picture()] * 3]
    with pytest.raises(ValueError, match=f"^Clip 1, frame 2: the box .*{message}") as error:
        video_processor(clips, boxes=[[None], [None, [0, 0, 1, 1], box]])
    assert "\n" not in str(error.value)


def test_boxes_that_overshoot_a_little_are_cut_off(video_processor, make_picture):
    def mask(box):
        return video_processor([[make_picture()]], boxes=[[box]], box_iou_threshold=0.3)["patch_mask"]

    assert torch.equal(mask([-0.05, 0, 0.25, 0.25]), mask([0, 0, 0.25, 0.25]))
    assert torch.equal(mask([0.75, 0.75, 1.04, 1.05]), mask([0.75, 0.75, 1, 1]))


def test_recorded_patch_masks_and_sampling(reference_dir):
    recorded = json.loads((reference_dir / "golden_functions.json").read_text())
    assert len(recorded["patch_mask"]) > 30
    for case in recorded["patch_mask"]:
        mask = boxes_to_patch_mask(case["boxes"], iou_threshold=case["iou_thresh"])
        assert mask.int().tolist() == case["mask"][1:], case
    case = recorded["patch_mask_no_cls"]
    assert boxes_to_patch_mask(case["boxes"], iou_threshold=case["iou_thresh"]).int().tolist() == case["mask"]
    assert len(recorded["frame_sampling"]) > 100
    for case in recorded["frame_sampling"]:
        arguments = case["num_frames"], case["max_frames"]
        assert sample_frame_indices(*arguments, "eval") == case["eval_presample"]
        assert sample_frame_indices(*arguments, "train") == case["train_uniform"]


def test_recorded_ious(reference_dir):
    """A patch passes at its recorded IoU and fails just above it."""
    recorded = json.loads((reference_dir / "golden_functions.json").read_text())
    cells, tested = recorded["grid_cells_ltrb"], 0
    for case in recorded["iou"]:
        for box, cell in ((case["a"], case["b"]), (case["b"], case["a"])):
            if cell in cells and case["iou"] > 0:
                for threshold, expected in ((case["iou"] * (1 - 1e-9), True), (case["iou"] * (1 + 1e-9), False)):
                    mask = boxes_to_patch_mask([box], iou_threshold=threshold)
                    assert bool(mask[cells.index(cell)]) == expected or mask.all()
                    tested += 1
    assert tested


def test_every_form_of_a_frame_gives_the_same_pixels(video_processor, make_picture, tmp_path):
    pictures = [make_picture(seed=i) for i in range(3)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        Image.fromarray(picture).save(path)
    array = np.stack(pictures)
    expected = video_processor([[Image.fromarray(picture) for picture in pictures]], return_tensors="pt")
    assert expected["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    forms = {
        "arrays": [pictures],
        "channels first": [[picture.transpose(2, 0, 1) for picture in pictures]],
        "tensors": [[torch.from_numpy(picture) for picture in pictures]],
        "paths": [paths],
        "path strings": [[str(path) for path in paths]],
        "array of a clip": [array],
        "tensor of a clip": [torch.from_numpy(array).permute(0, 3, 1, 2)],
        "batch array": array[None],
        "one clip, pictures": [Image.fromarray(picture) for picture in pictures],
        "one clip, arrays": pictures,
        "one clip, array": array,
        "one clip, tensor": torch.from_numpy(array),
        "mixed": [[Image.fromarray(pictures[0]), pictures[1], paths[2]]],
    }
    for name, videos in forms.items():
        actual = video_processor(videos, return_tensors="pt")
        assert torch.equal(actual["pixel_values_videos"], expected["pixel_values_videos"]), name
        assert actual["frame_mask"].tolist() == [[True] * 3]


def test_grey_and_transparent_pictures_become_rgb(video_processor, make_picture):
    grey = make_picture()[..., 0]
    pixels = video_processor([[grey, Image.fromarray(grey), np.stack([grey] * 3, -1)]])["pixel_values_videos"][0]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    opaque = Image.fromarray(make_picture())
    pixels = video_processor([[opaque, opaque.convert("RGBA")]])["pixel_values_videos"][0]
    assert torch.equal(pixels[0], pixels[1])


def test_rotation_tags_of_photographs_are_honoured(video_processor, make_picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_picture()).save(tmp_path / "tagged.png", exif=exif)
    upright = np.rot90(make_picture(), k=-1).copy()
    pixels = video_processor([[tmp_path / "tagged.png", upright]])["pixel_values_videos"][0]
    assert torch.equal(pixels[0], pixels[1])


def test_floats_in_0_to_1_are_pictures_too(video_processor, make_picture):
    picture = make_picture(32, 32)
    pixels = video_processor([[picture, picture / 255, torch.from_numpy(picture).float() / 255]])
    pixels = pixels["pixel_values_videos"][0]
    torch.testing.assert_close(pixels[1], pixels[0])
    torch.testing.assert_close(pixels[2], pixels[0])
    shrunk = video_processor([[make_picture(70, 50), make_picture(70, 50) / 255]])["pixel_values_videos"][0]
    assert (grey_levels(shrunk[1]) - grey_levels(shrunk[0])).abs().max() < 3


def test_normalisation_by_hand(video_processor):
    flat = np.full((10, 12, 3), (255, 0, 51), dtype=np.uint8)
    pixels = video_processor([[flat]])["pixel_values_videos"][0, 0]
    expected = (torch.tensor([1.0, 0.0, 0.2])[:, None, None] - MEAN) / STD
    torch.testing.assert_close(pixels, expected.expand(3, 32, 32))
    raw = video_processor([[flat]], do_normalize=False, do_rescale=False)["pixel_values_videos"][0, 0]
    assert raw[:, 3, 3].tolist() == [255, 0, 51]


def test_frames_of_unequal_size_share_a_clip(video_processor, make_picture):
    pictures = [make_picture(20, 30, 1), make_picture(64, 16, 2), make_picture(20, 30, 3)]
    together = video_processor([pictures])["pixel_values_videos"][0]
    for i, picture in enumerate(pictures):
        torch.testing.assert_close(together[i], video_processor([[picture]])["pixel_values_videos"][0, 0])


def test_shorter_clips_are_padded_with_zeros(video_processor, make_picture):
    clips = [[make_picture(seed=i) for i in range(n)] for n in (3, 1)]
    inputs = video_processor(clips)
    assert inputs["frame_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert inputs["frame_mask"].dtype == torch.bool
    assert not inputs["pixel_values_videos"][1, 1:].any() and inputs["pixel_values_videos"][1, 0].any()
    alone = video_processor(clips[1:])
    assert alone["pixel_values_videos"].shape[1] == 1
    longest = video_processor(clips, padding="max_length")
    assert longest["frame_mask"].sum(dim=1).tolist() == [3, 1] and longest["frame_mask"].shape == (2, 4)


def test_long_clips_are_sampled_before_they_are_decoded(video_processor, make_picture, tmp_path):
    frames = [make_picture(seed=i) for i in range(9)]
    chosen = sample_frame_indices(9, 4, "eval")
    missing = [frames[i] if i in chosen else tmp_path / "missing.png" for i in range(9)]
    actual = video_processor([missing])["pixel_values_videos"]
    assert torch.equal(actual, video_processor([[frames[i] for i in chosen]])["pixel_values_videos"])
    train = video_processor([frames], sampling="train")["pixel_values_videos"]
    assert torch.equal(train, video_processor([[frames[i] for i in (0, 2, 5, 8)]])["pixel_values_videos"])
    assert video_processor([frames], num_frames=2)["pixel_values_videos"].shape[1] == 2
    assert video_processor([frames], do_sample_frames=False)["pixel_values_videos"].shape[1] == 9


def test_boxes_travel_with_their_frames(video_processor, make_picture):
    frames = [make_picture(seed=i) for i in range(8)]
    boxes = [[0.0, 0.0, 0.25, 0.25] if i % 2 else [0.75, 0.75, 1.0, 1.0] for i in range(8)]
    boxes[4] = None
    inputs = video_processor([frames, frames[:1]], boxes=[boxes, [[[0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]]]], num_frames=4)
    assert inputs["patch_mask"].shape == (2, 4, 16) and inputs["patch_mask"].dtype == torch.bool
    for position, frame in enumerate(sample_frame_indices(8, 4, "eval")):
        box = boxes[frame]
        expected = boxes_to_patch_mask([] if box is None else [[32 * x for x in box]], 32, 8)
        assert torch.equal(inputs["patch_mask"][0, position], expected)
    assert inputs["patch_mask"][0, 2].all() and not inputs["patch_mask"][0, 0].all()
    two_boxes = boxes_to_patch_mask([[0, 0, 6.4, 6.4], [25.6, 25.6, 32, 32]], 32, 8)
    assert torch.equal(inputs["patch_mask"][1, 0], two_boxes)
    assert "patch_mask" not in video_processor([frames])


def test_frames_without_a_box_can_be_left_out(video_processor, make_picture):
    frames = [make_picture(seed=i) for i in range(3)]
    box = [0.0, 0.0, 0.25, 0.25]
    boxes = [[None, box, None], [None, None, None], [box, box, None]]
    whole = video_processor([frames] * 3, boxes=boxes)
    assert whole["frame_mask"].all() and whole["patch_mask"][0, 0].all()
    dropped = video_processor([frames] * 3, boxes=boxes, frames_without_box="drop")
    # A clip in which nothing was found keeps all its frames.
    assert dropped["frame_mask"].sum(dim=1).tolist() == [1, 3, 2]
    alone = video_processor([frames[1:2], frames, frames[:2]], boxes=[[box], [None] * 3, [box, box]])
    for name, values in alone.items():
        assert torch.equal(dropped[name], values), name
    assert torch.equal(video_processor([frames], frames_without_box="drop")["frame_mask"], torch.ones(1, 3).bool())
    with pytest.raises(
        ValueError, match='`frames_without_box` must be "keep" or "drop", got "some".'.replace('"', ".")
    ):
        video_processor([frames], frames_without_box="some")


def test_box_threshold_and_grid_can_be_set(make_picture):
    processor = RiceVideoProcessor(size={"height": 32, "width": 32}, patch_size=16, box_iou_threshold=0.9)
    mask = processor([[make_picture()]], boxes=[[[0, 0, 0.5, 0.5]]])["patch_mask"]
    assert mask.tolist() == [[[True, False, False, False]]]


def test_video_files_are_sampled(video_processor, make_video):
    path = make_video(num_frames=20)
    for form in (path, str(path), {"path": str(path)}, [path], [{"path": path, "start": None, "end": -1.0}]):
        pixels = video_processor(form)["pixel_values_videos"][0]
        levels = grey_levels(pixels).mean(dim=(1, 2, 3))
        torch.testing.assert_close(levels, torch.tensor([20.0, 70, 120, 170]), rtol=0, atol=4)
    assert video_processor([path, path], num_frames=3)["pixel_values_videos"].shape == (2, 3, 3, 32, 32)


def test_files_and_frame_lists_share_a_batch(video_processor, make_video, make_picture):
    inputs = video_processor([str(make_video()), [make_picture()]])
    assert inputs["frame_mask"].tolist() == [[True] * 4, [True, False, False, False]]


def test_clips_may_be_listed_by_sample(video_processor, make_picture, tmp_path):
    """As sentence-transformers and chat templates give them: a list of clips for each sample."""
    pictures = [Image.fromarray(make_picture(seed=i)) for i in range(3)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    expected = video_processor([pictures, pictures[:1], pictures[1:]])
    array = np.stack([np.asarray(picture) for picture in pictures])
    for nested in (
        [[pictures, pictures[:1]], [pictures[1:]]],
        [[paths], [paths[:1]], [paths[1:]]],
        [[array], [array[:1]], array[1:]],
    ):
        inputs = video_processor(nested)
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(inputs["frame_mask"], expected["frame_mask"])


@pytest.mark.parametrize(
    "videos, arguments, message",
    [
        ([], {}, "`videos` is empty"),
        ([[]], {}, "Clip 0 has no frames"),
        (["ok", []], {}, "Clip 1 has no frames"),
        (["ok"], {"boxes": []}, "`boxes` has 0 entries for 1 clips"),
        (["ok"], {"boxes": [[None, None]]}, "Clip 0 has 1 frames but 2 entries in `boxes`"),
        (["ok"], {"num_frame": 3}, "Unknown argument 'num_frame'"),
        (["ok"], {"padding": "short"}, '`padding` must be "longest" or "max_length"'),
        (["ok"], {"sampling": "random"}, "`sampling` must be"),
        (["ok"], {"num_frames": 0}, "must be at least 1"),
        (["ok"], {"size": {"min_pixels": 32, "max_pixels": 64}}, "`size` must be"),
        (["ok"], {"size": -3}, "`size` must be"),
        (["ok"], {"do_center_crop": True, "crop_size": 0}, "`crop_size` must be"),
        (["ok"], {"do_center_crop": True}, "`crop_size` must be"),
        (["ok"], {"do_center_crop": True, "crop_size": 33}, "`crop_size` must be at most the resized frame"),
        (["ok"], {"fps": 2}, "`fps` is not supported"),
        (["ok"], {"return_metadata": True}, "`return_metadata` is not supported"),
        (["ok"], {"do_pad": True}, "`do_pad` is not supported"),
        (["ok"], {"data_format": "channels_last"}, "`data_format` must be"),
        (["ok"], {"input_data_format": "last"}, "`input_data_format` must be"),
        (["ok"], {"do_convert_rgb": False}, "`do_convert_rgb=False` is not supported"),
        (["ok"], {"num_frames": "four"}, "`num_frames` must be of one of the types int, None, got 'four'"),
        (["ok", "two"], {"padding": False}, "`padding=False` needs clips of equal length, got 1 to 2 frames"),
        (["ok", "wide"], {"size": {"shortest_edge": 8}}, "The processed frames have different sizes"),
        ([[np.zeros((4, 4), dtype=bool)]], {}, "bool"),
        ([[np.zeros((8, 8, 3), dtype=np.int64)]], {}, "int64"),
        ([[np.full((8, 8, 3), 200.0)]], {}, r"floats in 0\.\.1"),
        ([[np.full((8, 8, 3), np.nan)]], {}, r"floats in 0\.\.1"),
        ([[np.zeros((8, 8, 4), dtype=np.uint8)]], {}, r"\(H, W, 3\) or \(3, H, W\), got shape \(8, 8, 4\)"),
        ([[np.zeros((8,), dtype=np.uint8)]], {}, "got shape"),
    ],
)
def test_bad_input_gets_one_sentence(video_processor, make_picture, videos, arguments, message):
    stand_ins = {"ok": [make_picture()], "two": [make_picture()] * 2, "wide": [make_picture(8, 50)]}
    videos = [stand_ins.get(clip, clip) if isinstance(clip, str) else clip for clip in videos]
    with pytest.raises(ValueError, match=message) as error:
        video_processor(videos, **arguments)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(video_processor, make_video, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (tmp_path / "torn.mp4").write_bytes(make_video(name="whole.mp4").read_bytes()[:200])
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no image file .*absent\.jpg"):
        video_processor([[tmp_path / "absent.jpg"]])
    with pytest.raises(FileNotFoundError, match=r"no video file .*absent\.mp4"):
        video_processor([tmp_path / "absent.mp4"])
    with pytest.raises(ValueError, match=r"torn\.jpg cannot be decoded"):
        video_processor([[tmp_path / "torn.jpg"]])
    for name in ("torn.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=rf"The video file .*{name} cannot be decoded"):
            video_processor([tmp_path / name])


def test_boxes_of_a_video_file_are_refused(video_processor, make_video):
    with pytest.raises(ValueError, match="Clip 0 is a video file; boxes need a list of frames"):
        video_processor([make_video()], boxes=[[[0, 0, 1, 1]]])


def test_save_and_load_keep_the_settings(tmp_path, make_picture):
    processor = RiceVideoProcessor(
        size={"height": 32, "width": 32}, patch_size=8, num_frames=3, sampling="train", box_iou_threshold=0.1
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is RiceVideoProcessor
    assert (loaded.patch_size, loaded.num_frames, loaded.sampling, loaded.box_iou_threshold) == (8, 3, "train", 0.1)
    clip, boxes = [make_picture(seed=i) for i in range(7)], [[[0, 0, 0.4, 0.4]] * 7]
    ours, theirs = processor([clip], boxes=boxes), loaded([clip], boxes=boxes)
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
    assert torch.equal(ours["patch_mask"], theirs["patch_mask"])


def test_arrays_can_be_returned(video_processor, make_picture):
    inputs = video_processor([[make_picture()]], return_tensors="np")
    assert isinstance(inputs["pixel_values_videos"], np.ndarray) and inputs["frame_mask"].dtype == bool


def two_pass_resize(picture, size, vertical_first):
    height, width = picture.shape[:2]
    between = (width, size) if vertical_first else (size, height)
    return np.array(Image.fromarray(picture).resize(between, Image.BICUBIC).resize((size, size), Image.BICUBIC))


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("size, name, step", [(32, "size32", 1), (224, "size224_every8", 8)])
def test_recorded_preprocessing(reference_dir, tokenizer, case, size, name, step):
    """Bit for bit by Pillow, whichever version is installed; torchvision's 8-bit weights have fewer digits."""
    tensors = load_file(reference_dir / "golden_preprocess.safetensors")
    picture, recorded = tensors[f"inputs/rgb_uint8_{case}"].numpy(), tensors[f"outputs/{name}_{case}"]
    exact = build_processor(tokenizer, image_size=size, resize_backend="pillow")
    inputs = exact(images=[Image.fromarray(picture)], videos=[[Image.fromarray(picture)]])
    for pixels in (inputs["pixel_values"][0], inputs["pixel_values_videos"][0, 0]):
        pixels = pixels[:, ::step, ::step]
        assert torch.equal(grey_levels(pixels).round(), grey_levels(recorded).round())
        assert (pixels - recorded).abs().max() < 1e-5

    processor = RiceVideoProcessor(size={"height": size, "width": size})
    ours = processor([[Image.fromarray(picture)]])["pixel_values_videos"][0, 0][:, ::step, ::step]
    width_first = torch.from_numpy(two_pass_resize(picture, size, False)).permute(2, 0, 1)[:, ::step, ::step]
    difference = (grey_levels(ours) - width_first).abs()
    assert difference.max() < 1.01
    assert (difference > 0.5).double().mean() < 0.02


@pytest.mark.parametrize(
    "height, width, vertical_first",
    [
        (100, 37, True),
        (100, 66, False),  # the height loses 68 pixels, which is not more than twice the width's 34
        (100, 65, True),
        (57, 57, False),
        (40, 20, True),
        (20, 90, False),
        (32, 10, False),  # the height does not shrink
        (33, 10, True),
    ],
)
def test_the_order_of_passes_is_that_of_the_recording(make_picture, height, width, vertical_first):
    picture = make_picture(height, width)
    expected = two_pass_resize(picture, 32, vertical_first)
    resized = resize_with_pillow(Image.fromarray(picture), (32, 32), Image.BICUBIC)
    assert np.array_equal(np.array(resized), expected)


def test_boxes_in_an_oblong_picture_mask_its_own_grid(make_picture):
    """Two rows of four patches: what covers the right half keeps the right half of both rows."""
    processor = RiceVideoProcessor(size={"height": 16, "width": 32}, patch_size=8)
    clip = [make_picture(40, 40)]
    inputs = processor([clip], boxes=[[[0.57, 0.0, 0.97, 0.96]]])
    assert inputs["pixel_values_videos"].shape == (1, 1, 3, 16, 32)
    assert inputs["patch_mask"][0, 0].tolist() == [False, False, True, True] * 2
    inputs = processor([clip], boxes=[[[0.0, 0.64, 0.97, 0.96]]])
    assert inputs["patch_mask"][0, 0].tolist() == [False] * 4 + [True] * 4
    cropped = RiceVideoProcessor(
        size={"height": 16, "width": 48}, crop_size={"height": 16, "width": 32}, do_center_crop=True, patch_size=8
    )
    inputs = cropped([clip], boxes=[[[0.0, 0.0, 0.29, 0.96]]])
    assert inputs["patch_mask"][0, 0].tolist() == [True, False, False, False] * 2


def test_the_processor_can_drop_frames(make_picture):
    processor = RiceVideoProcessor(size={"height": 16, "width": 16}, patch_size=8, num_frames=4)
    clips = [[make_picture(seed=i) for i in range(4)]] * 40
    whole = processor(clips[:1])["pixel_values_videos"][0]
    inputs = processor(clips, sampling="train_random_drop", padding="max_length")
    lengths = inputs["frame_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    for pixels, length in zip(inputs["pixel_values_videos"], lengths, strict=True):
        assert torch.equal(pixels[:length], whole[:length]) and not pixels[length:].any()
    kept = processor(clips, sampling="train_random_drop", do_sample_frames=False)
    assert kept["frame_mask"].all(), "frames that were chosen before stay"


def test_boxes_in_arrays_and_invalid_lists_of_boxes(make_picture):
    processor = RiceVideoProcessor(size={"height": 32, "width": 32}, patch_size=8)
    clips, boxes = [[make_picture(), make_picture()]] * 2, np.full((2, 2, 4), [0, 0, 0.5, 0.5])
    expected = processor(clips, boxes=boxes.tolist(), return_tensors="pt")["patch_mask"]
    assert expected.sum() < expected.numel()
    for same in (boxes, torch.from_numpy(boxes), tuple(boxes)):
        assert torch.equal(processor(clips, boxes=same, return_tensors="pt")["patch_mask"], expected)
    for wrong, message in (
        (5, "`boxes` is a int; give a list"),
        ({0: [None], 1: [None]}, "`boxes` is a dict; give a list"),
        ([5, None], "The entry of clip 0 in `boxes` is a int; give a list"),
        ([[5, None], None], "Clip 0, frame 0: the box 5 is not left-top-right-bottom"),
        ([[{}, None], None], "Clip 0, frame 0: the box {} is not left-top-right-bottom"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(clips, boxes=wrong)
