"""Fully sharded data parallelism (FSDP2) with gloo: each of two processes keeps half of every weight."""

import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from accelerate.state import PartialState

from modeling_rice import RiceConfig, RiceModel
from training_rice.gather import AllGather

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def build() -> RiceModel:
    torch.manual_seed(1)
    settings = {"projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0, "num_hard_negatives": 2}
    return RiceModel(RiceConfig(vision_config=VISION, **settings)).double()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64),
        "pixel_values_videos": torch.randn(4, 2, 3, 16, 16, generator=generator, dtype=torch.float64),
        "product_ids": torch.arange(4),
    }


def sharded_gradients(path: str) -> None:
    """In each process: the gradients of a step, put together and written by the first one."""
    PartialState(cpu=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # As docs/scale.md has it: the encoder's layers one by one, the rest as one.
    for layer in model.vision_model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    # A scalar cannot be split; this one does not train here.
    fully_shard(model, mesh=mesh, ignored_params={value for value in model.parameters() if value.ndim == 0})
    model.set_gather(AllGather())
    whole = sum(value.numel() for value in build().parameters())
    own = sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in model.parameters())
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    loss = model(**{name: value[rows] for name, value in batch().items()}).loss
    loss.backward()
    dist.all_reduce(loss.detach_())
    gradients = {name: value.grad.full_tensor() for name, value in model.named_parameters() if value.grad is not None}
    if dist.get_rank() == 0:
        torch.save({"loss": loss / 2, "share": torch.tensor(own / whole), "gradients": gradients}, path)


@pytest.mark.slow
def test_gradients_of_one_process(tmp_path):
    debug_launcher(sharded_gradients, args=(str(tmp_path / "gradients.pt"),), num_processes=2)
    result = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = build()
    loss = model(**batch()).loss
    loss.backward()
    assert result["share"] < 0.55
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-10, atol=0)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(result["gradients"][name], value.grad, rtol=1e-8, atol=1e-12, msg=name)
