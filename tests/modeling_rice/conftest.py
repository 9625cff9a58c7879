"""Tiny models and batches: 32-pixel pictures, 16 patches, two encoder layers."""

import pytest
import torch
from transformers import CLIPVisionConfig

from modeling_rice import RiceConfig, RiceModel

IMAGE_SIZE = 32
PATCHES = 16


def tiny_clip_config(**overrides) -> CLIPVisionConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**{**settings, **overrides})


@pytest.fixture
def make_config():
    """A function that builds a small configuration, optionally from a preset."""

    def make(preset: str | None = None, **overrides) -> RiceConfig:
        settings = {"vision_config": tiny_clip_config(), "projection_dim": 16, "decoder_num_heads": 4, **overrides}
        return RiceConfig(**settings) if preset is None else RiceConfig.from_preset(preset, **settings)

    return make


@pytest.fixture
def make_model(make_config):
    """A function that builds a small model in eval mode, its parameters large enough to matter everywhere."""

    def make(preset: str | None = None, dtype: torch.dtype = torch.float32, **overrides) -> RiceModel:
        torch.manual_seed(1)
        model = RiceModel(make_config(preset, **overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.2 * torch.randn_like(parameter))
            if model.reconstruction_head is not None:
                # Kept alive under its ReLUs, or there would be no gradient to compare.
                for parameter in model.reconstruction_head.parameters():
                    parameter.abs_()
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_batch():
    """A function that draws a batch; clips have uneven numbers of real frames and padding holds noise."""

    def make(
        size: int = 5,
        frames: int = 3,
        dtype: torch.dtype = torch.float32,
        patch_mask: bool = False,
        text_dim: int | None = None,
        product_ids: list[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        lengths = torch.tensor([frames, 1, frames - 1, frames, 2] * size)[:size]
        batch = {
            "pixel_values": draw(size, 3, IMAGE_SIZE, IMAGE_SIZE),
            "pixel_values_videos": draw(size, frames, 3, IMAGE_SIZE, IMAGE_SIZE),
            "frame_mask": torch.arange(frames)[None] < lengths[:, None],
        }
        if patch_mask:
            batch["patch_mask"] = torch.rand(size, frames, PATCHES, generator=generator) < 0.5
        if text_dim is not None:
            batch |= {"title_embeds": draw(size, text_dim), "asr_embeds": draw(size, text_dim)}
        if product_ids is not None:
            batch["product_ids"] = torch.tensor(product_ids)
        return batch

    return make
