"""A checkpoint folder, or the id of a published model, as a model that is ready to encode, with its processor."""

import os


def load_model(path: str | os.PathLike, device: str | None = None):
    """
    Args:
        path: Checkpoint folder, or id of a published model.
        device: Such as "cpu" or "cuda"; by default cuda where there is one.

    Returns:
        Model in eval mode on its device, and processor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint is not whole, is of another kind, has no processor, or the device cannot be used.
        PermissionError, ConnectionError: what the Hub answered, see `hub_rice.repository.hub_errors`.
    """
    from transformers import AutoModel, AutoProcessor

    import modeling_rice
    import processing_rice  # noqa: F401  (registers the processor with AutoProcessor)

    from .checkpoint import check_checkpoint, check_settings
    from .repository import hub_errors

    path = os.fspath(path)
    check_checkpoint(path)
    with hub_errors(path):
        check_settings(path, modeling_rice.RiceConfig)
        model, report = AutoModel.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True)
        missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}: save it again.")
        if not hasattr(model, "encode_gallery"):
            raise ValueError(f"{path} holds a {model.config.model_type} model: name one of RICE.")
        try:
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} has no processor that can be loaded ({reason}): save it there.") from error
    return to_device(model, device).eval(), processor


def to_device(model, device: str | None = None):
    """The model on `device`, by default a GPU where there is one; raises `ValueError` where that cannot be used."""
    import torch

    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())}") from error
