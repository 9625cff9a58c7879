"""A RICE model's parts as they run at inference, on frames that are packed already: for export and for compilation.

Packing clips, that is leaving out padded frames, has shapes that depend on the data, so it stays outside.
"""

import torch
from torch import Tensor, nn

from modeling_rice import RiceModel


class EncoderTower(nn.Module):
    """
    Pictures `(n, 3, H, W)`, of the shop or frames -> what the vision encoder makes of them, on which everything else
    stands: the global feature `(n, W)`, the patches `(n, P, C)`, and where these are of an inner layer also the last
    ones.
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
    """A part that gives as many of its class's outputs as the model has."""

    all_outputs: dict[str, tuple]

    def __init__(self, model: RiceModel):
        super().__init__()
        self.model = model
        absent = {"states", "keys", "values"} if model.decoder is None else set()
        absent |= {"patches"} if model.alignment is None else set()
        self.outputs = {name: shape for name, shape in self.all_outputs.items() if name not in absent}


class ImageTower(_Tower):
    """
    Shop images `(n, 3, H, W)` -> embeddings `(n, D)`; with a decoder its states `(n, d)`; with an alignment its
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
    The frames of all clips `(f, 3, H, W)`, one after the other, which of them each clip has in order `(c, T)`, and a
    mask of the same shape, `True` = real -> embeddings `(c, D)`; with a decoder every frame's keys and values
    `(f, 1 + P, d)`; with an alignment every frame's patches `(f, P, R)`.
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
            # A clip's keys and values are its frames', so that frames may be in several clips here too.
            mask = torch.ones(frames.tokens.shape[:2], dtype=torch.bool, device=pixel_values.device)
            outputs["keys"], outputs["values"], _ = model.decoder.encode_clips(frames.tokens, mask)
        return tuple(outputs[name] for name in self.outputs)


class PairScorer(nn.Module):
    """States `(n, d)`, keys and values `(c, S, d)` and their mask `(c, S)`, `True` = real -> scores `(c, n)`."""

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
    """`encoder`, `image`, `video` and, where there is a decoder, `pairs`."""
    parts = {"encoder": EncoderTower(model), "image": ImageTower(model), "video": VideoTower(model)}
    return parts if model.decoder is None else parts | {"pairs": PairScorer(model)}


def pack(pixel_values_videos: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Clips `(c, T, 3, H, W)` and their mask `(c, T)` -> [`VideoTower`]'s three inputs.

    Raises:
        ValueError: for a clip without a real frame.
    """
    if frame_mask is None:
        frame_mask = torch.ones(pixel_values_videos.shape[:2], dtype=torch.bool)
    counts = frame_mask.sum(dim=1)
    if not counts.all():
        raise ValueError(f"Clip {int(counts.argmin())} of the batch has no real frame in `frame_mask`; leave it out.")
    # Padding points at any frame; the mask leaves it out.
    index = (frame_mask.flatten().cumsum(dim=0) - 1).clamp(min=0).reshape(frame_mask.shape)
    return pixel_values_videos[frame_mask], index, frame_mask


def unpack(tokens: Tensor, frame_mask: Tensor) -> Tensor:
    """Every frame's tokens `(f, L, d)` -> the clips' tokens `(c, T * L, d)`, zero at padded frames."""
    unpacked = tokens.new_zeros(*frame_mask.shape, *tokens.shape[1:])
    unpacked[frame_mask] = tokens
    return unpacked.flatten(1, 2)
