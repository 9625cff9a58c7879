"""A published model loads in a process without this project: from the server, offline, and saved again."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hub_rice.repository import publication

EMBED = """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, AutoVideoProcessor,
)

torch.set_num_threads(1)

def embed(name, output, **options):
    config = AutoConfig.from_pretrained(name, **options)
    assert config.model_type == "rice"
    model, processor = (auto.from_pretrained(name, **options) for auto in (AutoModel, AutoProcessor))
    images = AutoImageProcessor.from_pretrained(name, **options)
    videos = AutoVideoProcessor.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    pictures = [Image.open(path) for path in PICTURES]
    clips = model.encode_clips(**processor(videos=[pictures, pictures[:1]], boxes=[[[0, 0, 0.5, 0.5]] * 3, [None]]))
    gallery = model.encode_gallery(**processor(images=pictures))
    save_file({
        "clips": clips.embeds, "images": gallery.embeds, "scores": model.match(clips, gallery),
        "pixels": images(pictures, return_tensors="pt")["pixel_values"],
        "frames": videos([pictures], return_tensors="pt")["pixel_values_videos"],
        "ids": torch.tensor(tokenizer("a red mug")["input_ids"]),
        "title_ids": processor(titles=["a red mug"])["title_input_ids"][0],
    }, output)
    return model, processor
"""

FIRST = """
model, processor = embed("someone/loaded", OUTPUT + "/server", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
model.save_pretrained(OUTPUT + "/saved")
processor.save_pretrained(OUTPUT + "/saved")
"""

# The card's examples name these files.
PHOTOGRAPHS = """
from PIL import Image

for name in ("red_mug.jpg", "blue_mug.jpg", "frame_0.jpg", "frame_1.jpg"):
    Image.effect_noise((40, 30), 90).convert("RGB").save(name)
"""

OFFLINE = """
embed("someone/loaded", OUTPUT + "/cached", trust_remote_code=True)
embed(OUTPUT + "/saved", OUTPUT + "/resaved", trust_remote_code=True)
embed(FOLDER, OUTPUT + "/folder", trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(40, 30), (32, 32), (31, 60)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def loaded(running_hub, tiny_checkpoint, pictures, fresh_process, client, tmp_path_factory):
    """What each way of loading gave, by name, and the requests of the process that was offline."""
    from collections import Counter

    files = publication(tiny_checkpoint, "someone/loaded", license="apache-2.0")
    running_hub.add(
        "someone/loaded", {n: item if isinstance(item, bytes) else item.read_bytes() for n, item in files.items()}
    )
    output = tmp_path_factory.mktemp("loaded")
    start = f"PICTURES = {pictures!r}\nOUTPUT = {str(output)!r}\nFOLDER = {str(tiny_checkpoint)!r}\n" + EMBED
    examples = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(examples) == 3 and all("someone/loaded" in example for example in examples[:1])
    printed = fresh_process(start + FIRST + PHOTOGRAPHS + "\n".join(examples))
    before = Counter(running_hub.requests)
    fresh_process(start + OFFLINE, HF_HUB_OFFLINE="1")
    asked_offline = running_hub.requests - before
    imported = "import modeling_rice, processing_rice\n" + start
    client(
        imported + f'model, processor = embed("someone/loaded", {str(output)!r} + "/imported")\n'
        "assert type(model) is modeling_rice.RiceModel and type(processor) is processing_rice.RiceProcessor\n"
    )
    return output, asked_offline, printed


@pytest.mark.parametrize("way", ["server", "cached", "resaved", "folder", "imported"])
def test_every_way_of_loading_gives_the_same(loaded, way, tiny_checkpoint, pictures):
    namespace = {"PICTURES": pictures}
    from transformers import AutoModel, AutoProcessor

    import modeling_rice  # noqa: F401
    import processing_rice  # noqa: F401

    model, processor = AutoModel.from_pretrained(tiny_checkpoint), AutoProcessor.from_pretrained(tiny_checkpoint)
    opened = [Image.open(path) for path in namespace["PICTURES"]]
    inputs = processor(videos=[opened, opened[:1]], boxes=[[[0, 0, 0.5, 0.5]] * 3, [None]])
    clips, gallery = model.encode_clips(**inputs), model.encode_gallery(**processor(images=opened))
    actual = load_file(loaded[0] / way)
    assert torch.equal(actual["clips"], clips.embeds) and torch.equal(actual["images"], gallery.embeds)
    assert torch.equal(actual["scores"], model.match(clips, gallery))
    assert torch.equal(actual["pixels"], processor(images=opened)["pixel_values"])
    assert torch.equal(actual["frames"], processor(videos=[opened])["pixel_values_videos"])
    assert torch.equal(actual["ids"], actual["title_ids"])


def test_examples_of_the_card_print_scores_and_a_ranking(loaded):
    scores, ranking = re.findall(r"^tensor\((.*?)[,)] *(?:grad_fn.*)?$", loaded[2], re.MULTILINE)
    assert scores.count(".") == 2 and sorted(re.findall(r"\d", ranking)) == ["0", "1"]


def test_offline_loading_sends_no_request(loaded):
    assert not loaded[1]


def test_a_saved_copy_does_not_refer_to_the_repository(loaded):
    saved = loaded[0] / "saved"
    names = {path.name for path in saved.iterdir()}
    for file in ("config.json", "processor_config.json"):
        for reference in json.loads((saved / file).read_text())["auto_map"].values():
            assert "--" not in reference and f"{reference.partition('.')[0]}.py" in names
    for module in saved.glob("*.py"):
        for sibling in re.findall(r"^from \.(\w+) import", module.read_text(), re.MULTILINE):
            assert f"{sibling}.py" in names
