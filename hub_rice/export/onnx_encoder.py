"""A RICE model whose vision encoder, nearly all of the work, runs in onnxruntime; the rest runs in torch."""

import os
from pathlib import Path

import torch
from torch import Tensor

from modeling_rice import RiceModel
from modeling_rice.vision_rice import EncoderStates

from .onnx_model import Session, read_description


class EncodedByOnnx(RiceModel):
    """
    A [`RiceModel`] from `with_towers`, for inference on the CPU. The exported encoder does not support boxes, so they
    are refused.

    Attributes:
        precision: Precision of the encoder, "fp32" or "int8".
    """

    precision: str
    _session: Session

    def _encoder_output(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> EncoderStates:
        if patch_mask is not None:
            raise ValueError(
                "An exported encoder takes no boxes (`patch_mask`); leave them out, or use the torch model."
            )
        feed = {"pixel_values": pixel_values.float().contiguous().numpy()}
        features, patches, *last = map(torch.from_numpy, self._session.run(feed))
        return EncoderStates(features, patches, last[0] if last else patches)


def with_towers(model: RiceModel, folder: str | os.PathLike, int8: bool = False) -> EncodedByOnnx:
    """
    Replaces the encoder of a model by its exported encoder.

    Args:
        model: The exported model, in eval mode, float32, on the CPU. It is changed in place.
        folder: Output folder of `rice export`.
        int8: Use the quantised encoder.

    Raises:
        FileNotFoundError: if there is no such export.
        ValueError: if another model was exported, if a file is damaged, or if onnxruntime is not installed.
    """
    folder = Path(folder)
    about = read_description(folder)
    own, exported = model.fingerprint(), about["model_fingerprint"]
    if own != exported:
        raise ValueError(
            f"{folder} was exported from another model (fingerprint {exported}, this one has {own}); export this one."
        )
    part = about["parts"].get("encoder", {})
    name = part.get("int8_file" if int8 else "file")
    if name is None or not (folder / name).is_file():
        wanted = "encoder in int8" if int8 else "encoder"
        raise FileNotFoundError(f"{folder} has no {wanted}: export again{' with --int8' if int8 else ''} to have it.")
    session = Session(folder / name)
    model.__class__ = EncodedByOnnx
    model._session, model.precision = session, "int8" if int8 else "fp32"
    # Quantised weights give other encodings.
    return model.settle("-int8" if int8 else "")
