"""A model folder with its own code: no command runs it, and none asks whether to run it."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from hub_rice.loading import load_model
from modeling_rice import RiceModel
from processing_rice import RiceProcessor

REPOSITORY = Path(__file__).resolve().parents[2]
# Every class that a config may name; whichever is imported leaves a file behind.
EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "evil"
class Model(PreTrainedModel):
    config_class = Config
class Processor(ProcessorMixin): ...
class Image(CLIPImageProcessor): ...
class Tokenizer(PreTrainedTokenizerFast): ...
"""
NAMES = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoProcessor": "evil.Processor"}
NAMES |= {"AutoImageProcessor": "evil.Image", "AutoVideoProcessor": "evil.Image"}
NAMES |= {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoModelForObjectDetection": "evil.Model"}


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def evil(tiny_checkpoint, tmp_path):
    """A RICE checkpoint in which every auto_map names its own code, and where that code leaves its mark."""
    folder, marker = shutil.copytree(tiny_checkpoint, tmp_path / "evil"), tmp_path / "marker"
    for path in folder.glob("*.py"):
        path.write_text(EVIL.format(marker=str(marker)))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    rewrite(folder / "config.json", lambda c: c.update(auto_map=NAMES))
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(auto_map=NAMES))

    def parts(content):
        for section in (content, content["image_processor"], content["video_processor"]):
            section["auto_map"] = NAMES

    rewrite(folder / "processor_config.json", parts)
    return folder, marker


def unknown_classes(folder: Path) -> None:
    """Makes what transformers falls back to the folder's code for: kinds that nobody has registered."""
    rewrite(folder / "config.json", lambda c: c.update(model_type="evil", architectures=["Model"]))
    rewrite(folder / "processor_config.json", lambda c: c.update(processor_class="EvilProcessor"))
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer"))


def unknown_processor(folder: Path) -> None:
    rewrite(folder / "processor_config.json", lambda c: c.update(processor_class="EvilProcessor"))


def unknown_tokenizer(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer"))


def unknown_video_processor(folder: Path) -> None:
    rewrite(
        folder / "processor_config.json", lambda c: c["video_processor"].update(video_processor_type="EvilProcessor")
    )


def nested_encoder(folder: Path) -> None:
    """A vision_config of a kind that has no AutoModel, beside the folder's own code for it."""

    def change(content):
        content["vision_config"] |= {"auto_map": NAMES, "_name_or_path": str(folder), "model_type": "vit_mae_decoder"}

    rewrite(folder / "config.json", change)


def commands(folder: Path, data: Path, output: Path) -> dict[str, list]:
    """Each door through which a model comes in, by a name."""
    evaluation = ["--dataset", "mini_lpr4m", "--data_dir", data, "--output_dir", output, "--num_workers", "0"]
    training = ["--dataset", "mini_lpr4m", "--data_dir", data, "--output_dir", output, "--use_cpu", "--max_steps", "1"]
    training += ["--eval_strategy", "no", "--per_device_train_batch_size", "4", "--report_to", "none"]
    training += ["--validation_fraction", "0.3"]
    boxes = ["--dataset", "mini_lpr4m", "--data_dir", data]
    return {
        "eval": ["eval", "--model", folder, *evaluation],
        "baseline": ["eval", "--baseline", folder, *evaluation],
        "publish": ["publish", folder, "someone/evil", "--without_results"],
        "index": ["index", data, "--model", folder, "--output", output],
        "export": ["export", folder, output],
        "mteb": ["mteb", folder, "--output_dir", output],
        "detector": ["detector", "eval", "--detector", folder, *boxes],
        "train": ["train", *training, "--model_name_or_path", folder],
        "init_vision": ["train", *training, "--init_vision_from", folder],
        "init_text": ["train", *training, "--init_text_from", folder],
        "tokenizer": ["train", *training, "--tokenizer", folder],
    }


RUN = """
import io, pathlib, sys
from rice_cli import main

class Stdin(io.StringIO):
    asked = 0
    def readline(self, *size):
        Stdin.asked += 1
        return super().readline(*size)

marker = pathlib.Path(marker)
result = {}
for name, words in commands.items():
    sys.stdin = Stdin("y\\ny\\ny\\n")
    Stdin.asked = 0
    try:
        main([str(word) for word in words])
        ended = "0"
    except SystemExit as end:
        ended = str(end.code)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
    result[name] = [ended, Stdin.asked, marker.exists()]
    sys.stdin = sys.__stdin__
    for module in [m for m in sys.modules if m.startswith("transformers_modules")]:
        del sys.modules[module]
"""


def known_classes(folder: Path) -> None:
    """The kinds are this project's own, and so are the classes that are taken."""


CHANGES = [known_classes, unknown_processor, unknown_tokenizer, unknown_video_processor, nested_encoder]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_checkpoint_is_loaded_by_our_classes_or_refused(evil, change, monkeypatch):
    folder, marker = evil
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    if change is known_classes:
        model, processor = load_model(folder, "cpu")
        assert type(model) is RiceModel and type(processor) is RiceProcessor
    else:
        with pytest.raises(ValueError, match="Python code|save it again|save its processor") as refusal:
            load_model(folder, "cpu")
        assert "\n" not in str(refusal.value)
    assert not marker.exists()


def test_every_auto_class_gets_trust_remote_code():
    """A call that says nothing asks on standard input, and runs what it is told to."""
    silent = []
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*_rice/**/*.py")]:
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func)
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                told = any(keyword.arg in ("trust_remote_code", None) for keyword in call.keywords)
                silent += [] if told else [f"{path.relative_to(REPOSITORY)}:{call.lineno} {name}"]
    assert not silent


SLOW = [pytest.param(change, marks=pytest.mark.slow) for change in CHANGES]


@pytest.mark.parametrize("change", [unknown_classes, *SLOW], ids=lambda change: change.__name__)
def test_no_command_runs_or_asks_for_the_code_of_a_folder(evil, change, client, tiny_mini, tmp_path):
    folder, marker = evil
    change(folder)
    doors = commands(folder, tiny_mini, tmp_path / "out")
    ended = client(RUN, commands=doors, marker=str(marker))
    assert all(code in ("0", "2") for code, _, _ in ended.values()), ended
    assert not any(asked or ran for _, asked, ran in ended.values()), ended


def test_trusted_code_is_run(evil, client):
    """The attack works: the same folder, loaded by transformers with the question answered."""
    folder, marker = evil
    unknown_classes(folder)
    code = "from transformers import AutoConfig\nAutoConfig.from_pretrained(folder, trust_remote_code=True)"
    client.attempt(code, folder=str(folder))
    assert marker.exists()


def test_a_baseline_can_be_trusted_by_an_option(evil, client, tiny_mini, tmp_path):
    folder, marker = evil
    unknown_classes(folder)
    words = [*commands(folder, tiny_mini, tmp_path / "out")["baseline"], "--trust_remote_code"]
    client.attempt(RUN, commands={"baseline": words}, marker=str(marker))
    # What trusted code does is not this project's to judge.
    assert marker.exists()
