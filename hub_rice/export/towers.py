"""The parts of a RICE model at inference, on packed frames, for export and for compilation.

Packing removes the padded frames of clips. Its output shapes depend on the data, so it is not part of the graphs.
"""

import torch
from torch import Tensor, nn

from modeling_rice import RiceModel


class EncoderTower(nn.Module):
    """
    Images or frames `(n, 3, H, W)` -> outputs of the vision encoder: the global feature `(n, W)`, the patches
    `(n, P, C)`, and if these come from an inner layer also the last layer's patches `(n, P', W')`.
    """

    inputs = {"pixel_values": ("images", 3, "height", "width")}
    outputs = {"features": ("images", "W"), "patches": ("images", "P", "C"), "last_patches": ("images", "P'", "W'")}

    def __init__(self, model: RiceModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features, patches, last = self.model._encoder_output(pixel_values)
        return (features, patches) if last is None or last is patches else (features, patches, last)


class _Tower(nn.Module):
    """A part whose outputs are those of `all_outputs` that the model has."""

    all_outputs: dict[str, tuple]

    def __init__(self, model: RiceModel):
        super().__init__()
        self.model = model
        absent = {"states", "keys", "values"} if model.decoder is None else set()
        absent |= {"patches"} if model.alignment is None else set()
        self.outputs = {name: shape for name, shape in self.all_outputs.items() if name not in absent}


class ImageTower(_Tower):
    """
    Shop images `(n, 3, H, W)` -> embeddings `(n, D)`; with a decoder also states `(n, d)`; with an alignment also
    patches `(n, P, R)`.
    """

    inputs = {"pixel_values": ("images", 3, "height", "width")}
    all_outputs = {"embeds": ("images", "D"), "states": ("images", "d"), "patches": ("images", "P", "R")}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        images = self.model.image_tokens(pixel_values)
        outputs = {"embeds": images.embeds, "patches": images.patches}
        if images.states is not None:
            outputs["states"] = images.states[:, 0]
        return tuple(outputs[name] for name in self.outputs)


class VideoTower(_Tower):
    """
    Frames of all clips `(f, 3, H, W)`, frame indices of each clip `(c, T)`, and a mask of the same shape, `True` =
    real frame -> embeddings `(c, D)`; with a decoder also keys and values of each frame `(f, 1 + P, d)`; with an
    alignment also patches of each frame `(f, P, R)`.
    """

    inputs = {
        "pixel_values": ("frames", 3, "height", "width"),
        "frame_index": ("clips", "length"),
        "frame_mask": ("clips", "length"),
    }
    all_outputs = {
        "embeds": ("clips", "D"),
        "keys": ("frames", "frame_tokens", "d"),
        "values": ("frames", "frame_tokens", "d"),
        "patches": ("frames", "P", "R"),
    }

    def forward(self, pixel_values: Tensor, frame_index: Tensor, frame_mask: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        frames = model.encode_frames(pixel_values)
        embeds = model.pool_features(frames.features[frame_index], frame_mask)
        outputs = {"embeds": embeds, "patches": frames.patches}
        if model.decoder is not None:
            # Keys and values are computed per frame, so that several clips can share a frame.
            mask = torch.ones(frames.tokens.shape[:2], dtype=torch.bool, device=pixel_values.device)
            outputs["keys"], outputs["values"], _ = model.decoder.encode_clips(frames.tokens, mask)
        return tuple(outputs[name] for name in self.outputs)


class PairScorer(nn.Module):
    """States `(n, d)`, keys and values `(c, S, d)`, their mask `(c, S)`, `True` = real token -> scores `(c, n)`."""

    inputs = {
        "states": ("images", "d"),
        "keys": ("clips", "tokens", "d"),
        "values": ("clips", "tokens", "d"),
        "mask": ("clips", "tokens"),
    }
    outputs = {"scores": ("clips", "images")}

    def __init__(self, model: RiceModel):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.decoder.score_pairs(states, keys, values, mask),)


def towers(model: RiceModel) -> dict[str, nn.Module]:
    """The parts by name: `encoder`, `image`, `video` and, if the model has a decoder, `pairs`."""
    parts = {"encoder": EncoderTower(model), "image": ImageTower(model), "video": VideoTower(model)}
    return parts if model.decoder is None else parts | {"pairs": PairScorer(model)}


def pack(pixel_values_videos: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Clips `(c, T, 3, H, W)` and their mask `(c, T)` -> the three inputs of [`VideoTower`].

    Raises:
        ValueError: for a clip without a real frame.
    """
    if frame_mask is None:
        frame_mask = torch.ones(pixel_values_videos.shape[:2], dtype=torch.bool)
    counts = frame_mask.sum(dim=1)
    if not counts.all():
        raise ValueError(f"Clip {int(counts.argmin())} of the batch has no real frame in `frame_mask`; leave it out.")
    # The index of a padded frame may be any frame; the mask excludes it.
    index = (frame_mask.flatten().cumsum(dim=0) - 1).clamp(min=0).reshape(frame_mask.shape)
    return pixel_values_videos[frame_mask], index, frame_mask


def unpack(tokens: Tensor, frame_mask: Tensor) -> Tensor:
    """Tokens of each frame `(f, L, d)` -> tokens of each clip `(c, T * L, d)`, zero at padded frames."""
    unpacked = tokens.new_zeros(*frame_mask.shape, *tokens.shape[1:])
    unpacked[frame_mask] = tokens
    return unpacked.flatten(1, 2)
