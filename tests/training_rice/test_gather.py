"""
Losses and gradients of 2 and 4 processes against one process with the whole batch.

Run as a script this file is the processes: `python test_gather.py FOLDER` reads the cases of the folder and writes
each process's results beside them. A fresh interpreter that forks is safe on every machine and imports only once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_rice import RiceConfig
from training_rice.gather import exchanged_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH, FRAMES, PATCHES = 8, 3, 16
PROCESSES = 4
# Product 2 and 5 occur on different processes, product 3 twice on one, whether there are 2 or 4.
PRODUCTS = [1, 2, 3, 3, 5, 2, 4, 5]
TEXTS = ("title_embeds", "asr_embeds")
TERMS = ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss", "text_loss")
CASES = {
    "hardest": {"matching_negatives": "hardest"},
    "all": {"matching_negatives": "all"},
    "detached": {"matching_negatives": "all", "detach_matching_features": True},
    "mmf": {
        "matching_negatives": "hardest",
        "matching_score": "cosine",
        "decoder_token_source": "raw",
        "num_hard_negatives": 2,
    },
    "icl": {"use_decoder": False},
    "multi-positive": {
        "contrastive_targets": "multi_positive",
        "matching_negatives": "all",
        "matching_targets": "multi_positive",
    },
    "sigmoid": {"contrastive_loss": "sigmoid", "logit_bias_init_value": -3.0, "use_decoder": False},
    "text": {"matching_negatives": "all", "text_embed_dim": 6},
    "said": {
        "text_config": {
            "vocab_size": 20,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "text_score_weight": 2.0,
        "num_hard_negatives": 2,
    },
}
VARIANTS = {"plain": (), "products": ("product_ids",), "boxes": ("product_ids", "patch_mask")}
# Cases that are also run in single precision.
SINGLE = ("hardest", "all")


def _build(settings: dict, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    from modeling_rice import RiceConfig, RiceModel

    torch.manual_seed(1)
    model = RiceModel(RiceConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias", "text_logit_scale"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        if model.reconstruction_head is not None:
            # Kept alive under its ReLUs, or there would be no gradient to compare.
            for parameter in model.reconstruction_head.parameters():
                parameter.abs_()
    return model.to(dtype).train()


def _results(model: torch.nn.Module, batch: dict) -> dict:
    output = model(**batch, return_loss=True)
    output.loss.backward()
    named = getattr(model, "module", model).named_parameters()
    return {
        "terms": {name: output[name].detach() for name in TERMS if name in output},
        "gradients": {name: parameter.grad for name, parameter in named if parameter.grad is not None},
    }


def _gathered_rows(gather) -> dict:
    rows = torch.full((3, 4), float(gather.rank), requires_grad=True)
    gathered = gather(rows)
    # Each process weighs the rows of all of them differently, so that the sum over processes shows.
    (gathered * (gather.rank + 1) * torch.arange(gathered.numel()).reshape(gathered.shape)).sum().backward()
    numbers = gather(torch.tensor([gather.rank, 7]))
    transposed = gather(torch.arange(6.0).reshape(2, 3).T + 100 * gather.rank)
    sent = gather.bytes_sent
    constant = gather(torch.zeros(1))
    return {
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "numbers": numbers,
        "transposed": transposed,
        "sent": sent,
        "constant": constant.requires_grad,
    }


def _process(rank: int, folder: str) -> None:
    from training_rice.gather import AllGather

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    work = torch.load(f"{folder}/work.pt", weights_only=False)
    results = {"rows": _gathered_rows(AllGather())}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        place = rank % size
        rows = slice(place * BATCH // size, (place + 1) * BATCH // size)
        for name, settings, batch in work:
            gather = AllGather(group)
            model = _build(settings, batch["pixel_values"].dtype)
            model.set_gather(gather)
            model = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
            found = _results(model, {key: value[rows] for key, value in batch.items()})
            for value in found["terms"].values():
                dist.all_reduce(value, group=group)
                value /= size
            results[name, size] = found | {"bytes": gather.bytes_sent}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cases():
    """(name, settings, batch) of every combination of model and batch."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    base = {"vision_config": vision, "projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0}
    base |= {"learn_logit_scale": True, "logit_scale_init_value": 10.0, "matching_scale": 5.0}
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([3, 1, 2, 3, 2, 3, 1, 2])
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64),
        "pixel_values_videos": torch.randn(BATCH, FRAMES, 3, 32, 32, generator=generator, dtype=torch.float64),
        "frame_mask": torch.arange(FRAMES)[None] < lengths[:, None],
    }
    optional = {
        "product_ids": torch.tensor(PRODUCTS),
        "patch_mask": torch.rand(BATCH, FRAMES, PATCHES, generator=generator) < 0.5,
    }
    texts = {name: torch.randn(BATCH, 6, generator=generator, dtype=torch.float64) for name in TEXTS}
    said = {}
    # Pairs without a text come in unequal numbers to the processes.
    for kind, lengths in (("title", [3, 0, 4, 2, 4, 1, 2, 3]), ("asr", [4, 3, 0, 0, 2, 4, 3, 1])):
        said[f"{kind}_input_ids"] = torch.randint(20, (BATCH, 4), generator=generator)
        said[f"{kind}_attention_mask"] = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    found = []
    for case, settings in CASES.items():
        for variant, keys in VARIANTS.items():
            entries = batch | {key: optional[key] for key in keys} | {"text": texts, "said": said}.get(case, {})
            found.append((f"{case}-{variant}", base | settings, entries))
            if case in SINGLE:
                single = {key: value.float() if value.is_floating_point() else value for key, value in entries.items()}
                found.append((f"{case}-{variant}-single", base | settings, single))
    # Unequal numbers of them, too.
    noise = {"asr_is_noise": torch.tensor([True, False, False, False, False, True, True, False])}
    entries = batch | said | noise | {"product_ids": optional["product_ids"]}
    found.append(("said-noise", base | CASES["said"], entries))
    return found


@pytest.fixture(scope="module")
def processes(cases, tmp_path_factory):
    """What each of the processes found, in order of rank."""
    folder = tmp_path_factory.mktemp("gather")
    torch.save(cases, folder / "work.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def whole(cases):
    """What one process finds on the whole batch."""
    torch.set_num_threads(1)
    return {name: _results(_build(settings, batch["pixel_values"].dtype), batch) for name, settings, batch in cases}


def assert_equals_one_process(processes, expected, name, size, tolerance, floor=1e-3):
    for rank in range(PROCESSES):
        found = processes[rank][name, size]
        assert found["terms"].keys() == expected["terms"].keys()
        for term, value in expected["terms"].items():
            torch.testing.assert_close(found["terms"][term], value, rtol=tolerance, atol=0)
        # Norms, since single entries may be zero but for rounding.
        scale = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
        assert found["gradients"].keys() >= expected["gradients"].keys()
        for key, gradient in found["gradients"].items():
            reference = expected["gradients"].get(key, torch.zeros_like(gradient))
            assert (gradient - reference).norm() <= tolerance * (reference.norm() + floor * scale), key


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(processes, whole, case, variant, size):
    name = f"{case}-{variant}"
    expected = whole[name]
    assert expected["gradients"]["visual_projection.weight"].abs().max() > 1e-6
    if CASES[case].get("use_decoder", True):
        assert expected["gradients"]["reconstruction_head.conv1.weight"].abs().max() > 1e-9
        assert expected["terms"].keys() == set(TERMS) - ({"text_loss"} if case != "said" else set())
    assert_equals_one_process(processes, expected, name, size, 1e-10)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SINGLE)
def test_equals_one_process_in_single_precision(processes, whole, case, variant, size):
    name = f"{case}-{variant}-single"
    assert_equals_one_process(processes, whole[name], name, size, 1e-5, floor=1e-2)


@pytest.mark.parametrize("size", [2, 4])
def test_noisy_asr_equals_one_process(processes, whole, size):
    expected = whole["said-noise"]
    assert abs(expected["terms"]["text_loss"] - whole["said-products"]["terms"]["text_loss"]) > 1e-3
    assert_equals_one_process(processes, expected, "said-noise", size, 1e-10)


def test_products_change_the_loss(whole):
    """Or the comparison with several processes would say nothing about them."""
    for case in CASES:
        plain, masked = (whole[f"{case}-{variant}"]["terms"]["loss"] for variant in ("plain", "products"))
        assert abs(plain - masked) > 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_step(processes, cases, size):
    """
    Embeddings of both views, one decoder row per image, and this process's scores, there and their gradients back;
    product ids one way.
    """
    rows = BATCH // size
    embeddings = 2 * rows * 16 * 8
    decoder = rows * 16 * 8 + rows * BATCH * 8
    for rank in range(PROCESSES):
        found = {name: processes[rank][name, size]["bytes"] for name in ("icl-plain", "all-plain", "all-products")}
        assert found["icl-plain"] == 2 * embeddings * (size - 1)
        assert found["all-plain"] == 2 * (embeddings + decoder) * (size - 1)
        assert found["all-products"] == (2 * (embeddings + decoder) + rows * 8) * (size - 1)
        for name, settings, _ in cases:
            if name.endswith("products"):
                expected = exchanged_bytes(RiceConfig(**settings), rows, size, element_size=8)
                assert processes[rank][name, size]["bytes"] == expected, name


def test_gather_itself(processes):
    for rank, found in enumerate(result["rows"] for result in processes):
        assert torch.equal(found["gathered"], torch.arange(4.0).repeat_interleave(3)[:, None].expand(12, 4))
        weights = torch.arange(48.0).reshape(12, 4)[3 * rank : 3 * rank + 3]
        assert torch.equal(found["gradient"], (1 + 2 + 3 + 4) * weights)
        assert found["numbers"].tolist() == [0, 7, 1, 7, 2, 7, 3, 7]
        assert found["numbers"].dtype == torch.int64
        assert torch.equal(found["transposed"][3:6], torch.arange(6.0).reshape(2, 3).T + 100)
        assert found["sent"] == (2 * 12 * 4 + 2 * 8 + 6 * 4) * 3
        assert found["constant"] is False


if __name__ == "__main__":
    import modeling_rice  # noqa: F401  (imported once, before the forks)

    torch.multiprocessing.start_processes(_process, (sys.argv[1],), nprocs=PROCESSES, start_method="fork")
