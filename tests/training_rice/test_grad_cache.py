"""
The step in chunks against the plain step, losses and gradients.

Run as a script this file is two processes: `python test_grad_cache.py FOLDER` reads the cases of the folder and writes
each process's results beside them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH, FRAMES, PATCHES, TEXT_DIM = 8, 3, 16, 6
PRODUCTS = [1, 2, 3, 3, 5, 2, 4, 5]
TERMS = ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss")
CASES = {
    "icl": {"use_decoder": False},
    "hardest": {"matching_negatives": "hardest"},
    "all": {"matching_negatives": "all"},
    "without-pfr": {"matching_negatives": "all", "use_reconstruction": False},
    "detached": {"matching_negatives": "all", "detach_matching_features": True},
    "mmf": {"matching_score": "cosine", "decoder_token_source": "raw", "num_hard_negatives": 2},
    "multi-positive": {
        "contrastive_targets": "multi_positive",
        "matching_negatives": "all",
        "matching_targets": "multi_positive",
    },
    "sigmoid": {"use_decoder": False, "contrastive_loss": "sigmoid", "logit_bias_init_value": -3.0},
    "text": {"matching_negatives": "all", "text_embed_dim": TEXT_DIM},
}


def settings_of(case: str, **overrides) -> dict:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    base = {"vision_config": vision, "projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0}
    base |= {"learn_logit_scale": True, "logit_scale_init_value": 10.0, "matching_scale": 5.0}
    return base | CASES[case] | overrides


def build(settings: dict, dtype: torch.dtype = torch.float64):
    from modeling_rice import RiceConfig, RiceModel

    torch.manual_seed(1)
    model = RiceModel(RiceConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        if model.reconstruction_head is not None:
            # Kept alive under its ReLUs, or there would be no gradient to compare.
            for parameter in model.reconstruction_head.parameters():
                parameter.abs_()
    return model.to(dtype).train()


def make_batch(size: int = BATCH, text: bool = False, patch_mask: bool = False, seed: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([3, 1, 2, 3, 2, 3, 1, 2])[:size]
    batch = {
        "pixel_values": draw(size, 3, 32, 32),
        "pixel_values_videos": draw(size, FRAMES, 3, 32, 32),
        "frame_mask": torch.arange(FRAMES)[None] < lengths[:, None],
        "product_ids": torch.tensor(PRODUCTS)[:size],
    }
    if patch_mask:
        batch["patch_mask"] = torch.rand(size, FRAMES, PATCHES, generator=generator) < 0.5
    if text:
        batch |= {"title_embeds": draw(size, TEXT_DIM), "asr_embeds": draw(size, TEXT_DIM)}
    return batch


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    """Norms, since single entries may be zero but for rounding."""
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():
        reference = expected.get(name, torch.zeros_like(gradient))
        assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-3 * tolerance * scale, name


def assert_equal_step(model, batch: dict, chunk: int, tolerance: float = 1e-10, **options) -> None:
    from training_rice.grad_cache import GradCache

    plain = model(**batch)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    output = GradCache(chunk, **options)(model, batch)
    assert not output.loss.requires_grad
    for name in TERMS:
        assert (getattr(plain, name) is None) == (getattr(output, name) is None)
        if getattr(plain, name) is not None:
            torch.testing.assert_close(getattr(output, name), getattr(plain, name), rtol=tolerance, atol=tolerance)
    for name in ("image_embeds", "video_embeds", "matching_logits", "matching_indices"):
        if getattr(plain, name) is not None:
            torch.testing.assert_close(getattr(output, name), getattr(plain, name), rtol=tolerance, atol=tolerance)
    assert_close(gradients(model), expected, tolerance)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_step(case, chunk):
    """3 leaves an uneven last chunk."""
    assert_equal_step(build(settings_of(case)), make_batch(text=case == "text"), chunk)


@pytest.mark.parametrize("case", ["hardest", "all"])
def test_without_product_ids_and_with_boxes(case):
    batch = make_batch(patch_mask=True)
    del batch["product_ids"]
    assert_equal_step(build(settings_of(case)), batch, 3)


@pytest.mark.parametrize("case", ["hardest", "all"])
def test_pairs_image_by_image(case):
    assert_equal_step(build(settings_of(case)), make_batch(), 3, pair_memory=1)


def test_single_precision():
    model, batch = build(settings_of("all"), torch.float32), make_batch()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    assert_equal_step(model, batch, 3, tolerance=1e-5)


def test_every_part_has_a_gradient():
    """Or the comparisons would say nothing about it."""
    from training_rice.grad_cache import GradCache

    model = build(settings_of("hardest"))
    GradCache(3)(model, make_batch())
    for name in ("logit_scale", "vision_model.", "visual_projection.", "decoder.self_layers", "decoder.cross_layer"):
        assert any(p.grad is not None and p.grad.norm() > 1e-6 for n, p in model.named_parameters() if name in n), name
    assert model.reconstruction_head.conv1.weight.grad.norm() > 1e-9


def in_chunks(model, batch: dict, chunk: int) -> torch.Tensor:
    """The plain loss, its encoders fed chunk by chunk in the order of the cached step, all in one graph."""
    parts = [{name: value[i : i + chunk] for name, value in batch.items()} for i in range(0, BATCH, chunk)]
    images = [model.image_tokens(**part) for part in parts]
    states = torch.cat([image.states[:, 0] for image in images])
    clips, scores = [], []
    for part in parts:
        clips.append(clip := model.clip_tokens(**part))
        scores.append(model.decoder.score_pairs(states, clip.keys, clip.values, clip.mask))
    products, rows = batch["product_ids"], slice(0, BATCH)
    embeds = torch.cat([image.embeds for image in images]), torch.cat([clip.embeds for clip in clips])
    mined = model.mine_negatives(*embeds, products)
    loss = model.contrastive_loss(*embeds, products, rows)
    scores = torch.cat(scores)
    loss = loss + model.matching_loss(scores.T, scores, products, rows, mined)[0]
    for image, clip in zip(images, clips, strict=True):
        term = model.reconstruction_loss(image, clip)
        loss = loss + model.config.reconstruction_loss_weight * term * len(clip.keys) / BATCH
    return loss


@pytest.mark.parametrize("case", ["hardest", "all"])
def test_dropout_is_replayed(case):
    from training_rice.grad_cache import GradCache

    settings = settings_of(case, decoder_dropout=0.3)
    settings["vision_config"]["attention_dropout"] = 0.3
    model, batch = build(settings), make_batch()
    without = model.eval()(**batch).loss
    model.train()
    torch.manual_seed(7)
    expected = in_chunks(model, batch, 3)
    next_draw = torch.rand(())
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    output = GradCache(3)(model, batch)
    assert torch.rand(()) == next_draw
    assert abs(output.loss - without) > 1e-3
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    assert_close(gradients(model), reference)


def test_frozen_encoder():
    model = build(settings_of("all"))
    model.vision_model.requires_grad_(False)
    model.visual_projection.requires_grad_(False)
    assert_equal_step(model, make_batch(), 3)
    assert model.visual_projection.weight.grad is None


def test_gradient_checkpointing():
    model = build(settings_of("all"))
    model.gradient_checkpointing_enable()
    assert_equal_step(model, make_batch(), 3)


def test_memory_of_past_batches():
    """Used as by the plain step, and pushed once."""
    from training_rice.grad_cache import GradCache
    from training_rice.memory_queue import MemoryQueue

    model, batches = build(settings_of("all")), [make_batch(seed=2), make_batch(seed=3)]
    queues = MemoryQueue(12, 16), MemoryQueue(12, 16)
    model.set_memory(queues[0])
    expected = [model(**batch).loss for batch in batches]
    expected[1].backward()
    reference = gradients(model)
    model.set_memory(queues[1])
    for batch, loss in zip(batches, expected, strict=True):
        model.zero_grad()
        torch.testing.assert_close(GradCache(3)(model, batch).loss, loss, rtol=1e-6, atol=0)
    assert_close(gradients(model), reference, 1e-6)
    for name in ("image_embeds", "video_embeds", "product_ids", "position"):
        torch.testing.assert_close(getattr(queues[0], name), getattr(queues[1], name))


def test_backward_may_scale():
    from training_rice.grad_cache import GradCache

    model, batch = build(settings_of("all")), make_batch()
    model(**batch).loss.backward()
    expected = {name: gradient / 4 for name, gradient in gradients(model).items()}
    model.zero_grad()
    GradCache(3)(model, batch, lambda loss: (loss / 4).backward())
    assert_close(gradients(model), expected)


def test_gradients_add_up():
    from training_rice.grad_cache import GradCache

    model, batches = build(settings_of("hardest")), [make_batch(seed=2), make_batch(seed=3)]
    (model(**batches[0]).loss + model(**batches[1]).loss).backward()
    expected = gradients(model)
    model.zero_grad()
    for batch in batches:
        GradCache(3)(model, batch)
    assert_close(gradients(model), expected)


def test_autocast_in_bf16():
    """The weights that autocast casts without a graph in the first pass must not serve in the third."""
    from training_rice.grad_cache import GradCache

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    model, batch = build(settings_of("all"), torch.float32), make_batch()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    model(**batch).loss.backward()
    exact = gradients(model)
    model.zero_grad()
    with autocast():
        plain = model(**batch)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    output = GradCache(3, autocast)(model, batch)
    found = gradients(model)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(output.loss, plain.loss.float(), rtol=2e-2, atol=0)
    for name in ("vision_model.encoder.layers.0.mlp.fc1.weight", "decoder.cross_layer.attention.k_proj.weight"):
        rounding = (expected[name] - exact[name]).norm()
        assert 0 < (found[name] - exact[name]).norm() < 2 * rounding, name
    with autocast(), pytest.raises(ValueError, match="outside autocast"):
        GradCache(3, autocast)(model, batch)


def test_batch_norms_move_once_per_chunk():
    from modeling_rice import RiceConfig, RiceModel
    from training_rice.grad_cache import GradCache

    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    settings = settings_of("all", vision_config=vision | {"layer_type": "basic"}, vision_pooling="mean")
    model = RiceModel(RiceConfig(**settings, decoder_position_embeddings=False)).double().train()
    GradCache(3)(model, make_batch())
    counts = [buffer.item() for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counts) == {6}


def test_bad_arguments():
    from training_rice.grad_cache import GradCache

    with pytest.raises(ValueError, match="grad_cache_chunk must be at least 1, got 0"):
        GradCache(0)
    batch = make_batch()
    batch["pixel_values"] = batch["pixel_values"][:5]
    with pytest.raises(ValueError, match="5 images and 8 clips"):
        GradCache(3)(build(settings_of("icl")), batch)
    with pytest.raises(ValueError, match="global batch of at least 4, got 3"):
        GradCache(2)(build(settings_of("hardest")), make_batch(3))


def _process(rank: int, folder: str) -> None:
    from training_rice.gather import AllGather
    from training_rice.grad_cache import GradCache, average_gradients

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    results = {}
    for case, settings, batches in torch.load(f"{folder}/work.pt", weights_only=False):
        model = build(settings)
        model.set_gather(AllGather())
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        losses = []
        for batch in batches:
            output = GradCache(3)(ddp.module, {name: value[rows] for name, value in batch.items()})
            dist.all_reduce(output.loss)
            losses.append(output.loss / 2)
        average_gradients(ddp.module)
        results[case] = (torch.stack(losses), gradients(model), model.gather.bytes_sent)
        # An ordinary step after it, which the wrapper must not have been put out of step for.
        model.zero_grad()
        ddp(**{name: value[rows] for name, value in batches[0].items()}).loss.backward()
        results[f"{case}-plain"] = (None, gradients(model), 0)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def work():
    return [
        (case, settings_of(case), [make_batch(text=case == "text", seed=seed) for seed in (2, 3)]) for case in CASES
    ]


@pytest.fixture(scope="module")
def processes(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grad_cache")
    torch.save(work, folder / "work.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_and_two_accumulated_batches(processes, work, case):
    _, settings, batches = next(entry for entry in work if entry[0] == case)
    model = build(settings)
    losses = torch.stack([model(**batch).loss for batch in batches])
    losses.sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model(**batches[0]).loss.backward()
    plain = gradients(model)
    for found in processes:
        torch.testing.assert_close(found[case][0], losses.detach(), rtol=1e-10, atol=0)
        assert_close(found[case][1], expected)
        assert_close(found[f"{case}-plain"][1], plain)


if __name__ == "__main__":
    import modeling_rice  # noqa: F401  (imported once, before the forks)

    torch.multiprocessing.start_processes(_process, (sys.argv[1],), nprocs=2, start_method="fork")
