"""
The trainer with more negatives: chunks, memory of past batches, processes.

Run as a script this file is one of two processes: `python test_negatives.py FOLDER RANK`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

REPOSITORY = Path(__file__).resolve().parents[2]
CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
ROWS, FRAMES = 32, 2


class Rows(Dataset):
    """Random pictures; every fourth clip has one frame, every fifth pair another pair's product."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(ROWS, 3, 32, 32, generator=generator)
        self.clips = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict:
        return {
            "pixel_values": self.images[i],
            "pixel_values_videos": self.clips[i],
            "frame_mask": torch.tensor([True, i % 4 > 0]),
            "product_ids": torch.tensor(i if i % 5 else 0),
        }


def collate(rows: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_trainer(folder, settings: dict | None = None, **overrides):
    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import build_processor, train_tokenizer
    from training_rice.arguments import RiceTrainingArguments
    from training_rice.trainer import RiceTrainer

    fields = {"vision_config": dict(CLIP_VISION), "projection_dim": 16, "decoder_num_heads": 4, "decoder_dropout": 0.0}
    fields |= {"matching_negatives": "all", "logit_scale_init_value": 10.0, "learn_logit_scale": True}
    torch.manual_seed(1)
    model = RiceModel(RiceConfig(**fields | (settings or {})))
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        **overrides,
    }
    processor = build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20, vocab_size=400), 32, 8, FRAMES)
    return RiceTrainer(model, RiceTrainingArguments(**arguments), Rows(), collate, processing_class=processor)


def trained(folder, settings: dict | None = None, resume: bool = False, **overrides):
    trainer = make_trainer(folder, settings, **overrides)
    trainer.train(resume_from_checkpoint=resume or None)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return trainer, weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_way(found: dict, expected: dict, start: dict, tolerance: float = 1e-4) -> None:
    """The way from the start, of all weights together."""
    way = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    error = torch.cat([(found[name] - expected[name]).flatten() for name in start])
    assert way.norm() > 1e-3
    assert error.norm() < tolerance * way.norm()


class TestChunks:
    @pytest.mark.parametrize("settings", [{"matching_negatives": "hardest"}, {"matching_negatives": "all"}])
    def test_equal_the_plain_run(self, tmp_path, settings):
        """With accumulated batches, whose gradient is clipped, and an uneven last chunk."""
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
        start = make_trainer(tmp_path, settings).model.state_dict()
        _, plain, plain_log = trained(tmp_path, settings, **options)
        trainer, cached, log = trained(tmp_path, settings, grad_cache_chunk=3, **options)
        assert_same_way(cached, plain, start)
        assert len(log) == 2
        for found, expected in zip(log, plain_log, strict=True):
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            for name in ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6)
            for name in ("contrastive_accuracy", "matching_accuracy"):
                assert found.get(name) == expected.get(name)

    def test_bf16(self, tmp_path):
        """No further from single precision than the plain run in bf16."""
        options = [{}, {"bf16": True}, {"bf16": True, "grad_cache_chunk": 3}]
        exact, plain, cached = (trained(tmp_path, max_steps=1, **option)[1] for option in options)

        def distance(weights: dict) -> float:
            return torch.cat([(weights[name] - exact[name]).flatten() for name in exact]).norm().item()

        assert 0 < distance(cached) < 1.5 * distance(plain)

    def test_frozen_encoder_stays_in_eval_mode(self, tmp_path):
        trainer, weights, _ = trained(tmp_path, grad_cache_chunk=3, freeze_vision=True)
        start = make_trainer(tmp_path).model.state_dict()
        assert not trainer.model.vision_model.training and trainer.model.decoder.training
        for name, value in start.items():
            assert torch.equal(value, weights[name]) == name.startswith("vision_model."), name

    def test_start_says_what_is_kept(self, tmp_path):
        text = make_trainer(tmp_path, grad_cache_chunk=3).describe()
        assert "3 chunks of 3 pairs" in text and "256.0 MB for pairs" in text and "warning" not in text
        icl = make_trainer(tmp_path, {"use_decoder": False}, grad_cache_chunk=3).describe()
        assert "for pairs" not in icl

    def test_batch_norms_give_a_warning(self, tmp_path):
        vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        settings = {"vision_config": vision | {"layer_type": "basic"}, "vision_pooling": "mean", "use_decoder": False}
        assert "batch norms use chunks of 3" in make_trainer(tmp_path, settings, grad_cache_chunk=3).describe()

    def test_sharded_weights_are_refused(self, tmp_path, monkeypatch):
        from transformers import Trainer

        create = Trainer.create_accelerator_and_postprocess

        def claim_fsdp(trainer):
            create(trainer)
            trainer.is_fsdp_enabled = True

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", claim_fsdp)
        with pytest.raises(ValueError, match="grad_cache_chunk works with one process or data parallel ones"):
            make_trainer(tmp_path, grad_cache_chunk=3)


class TestMemory:
    def test_restored_bit_for_bit(self, tmp_path):
        options = {"memory_queue_size": 12, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        whole, expected, _ = trained(tmp_path / "whole", max_steps=4, **options)
        trained(tmp_path / "parts", max_steps=2, **options)
        parts, weights, _ = trained(tmp_path / "parts", resume=True, max_steps=4, **options)
        for name, value in expected.items():
            assert torch.equal(value, weights[name]), name
        for name, value in whole.memory_queue.state_dict().items():
            other = parts.memory_queue.state_dict()[name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
        assert len(parts.memory_queue) == 12
        assert not [name for name in weights if "memory" in name]

    def test_changes_the_loss_from_the_second_step(self, tmp_path):
        (_, _, plain), (_, _, log) = trained(tmp_path), trained(tmp_path, memory_queue_size=12)
        assert log[0]["contrastive_loss"] == pytest.approx(plain[0]["contrastive_loss"], abs=2e-6)
        assert log[1]["contrastive_loss"] > plain[1]["contrastive_loss"]

    def test_start_says_so(self, tmp_path):
        text = make_trainer(tmp_path, memory_queue_size=12).describe()
        assert "negatives per query = 7, and up to 12 from past batches" in text


def test_learnt_temperature_is_bounded(tmp_path):
    settings = {"logit_scale_init_value": 9.0, "logit_scale_max": 9.01, "use_decoder": False}
    ways = {}
    for bound in (9.01, None):
        trainer, _, _ = trained(tmp_path, settings | {"logit_scale_max": bound}, learning_rate=1.0)
        ways[bound] = trainer.model.logit_scale.exp().item()
    assert abs(ways[None] - 9.0) > 0.02
    assert ways[9.01] <= 9.01 + 1e-4


def test_negative_sizes_are_refused(tmp_path):
    for name in ("grad_cache_chunk", "memory_queue_size"):
        with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
            make_trainer(tmp_path, **{name: -1})


RUNS = {
    "plain": {},
    "chunks": {"grad_cache_chunk": 3, "gradient_accumulation_steps": 2},
    "memory": {"memory_queue_size": 20},
    # DDP splits graphs into its buckets, of which recomputed activations must know nothing.
    "compiled": {"torch_compile_backend": "aot_eager", "activation_checkpointing": True},
}


def _process(folder: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    results = {}
    for name, options in RUNS.items():
        trainer, weights, log = trained(folder / name, per_device_train_batch_size=4, **options)
        queue = trainer.memory_queue.state_dict() if trainer.memory_queue else {}
        results[name] = {"weights": weights, "log": log, "queue": queue, "text": trainer.describe()}
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    import socket

    folder = tmp_path_factory.mktemp("negatives")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(processes, tmp_path, name):
    start = make_trainer(tmp_path).model.state_dict()
    plain = ("grad_cache_chunk", "torch_compile_backend", "activation_checkpointing")
    options = {key: value for key, value in RUNS[name].items() if key not in plain}
    trainer, expected, expected_log = trained(tmp_path, **options)
    for found in processes:
        assert_same_way(found[name]["weights"], expected, start)
        for entry, reference in zip(found[name]["log"], expected_log, strict=True):
            for term in ("contrastive_loss", "matching_loss", "reconstruction_loss"):
                assert entry[term] == pytest.approx(reference[term], rel=1e-4, abs=2e-6)
    if trainer.memory_queue is not None:
        first, second = (found[name]["queue"] for found in processes)
        for key, value in trainer.memory_queue.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_exchanged_bytes_are_logged_and_counted(processes):
    from modeling_rice import RiceConfig
    from training_rice.gather import exchanged_bytes

    config = RiceConfig(vision_config=dict(CLIP_VISION), projection_dim=16, decoder_num_heads=4)
    expected = exchanged_bytes(config, 4, 2)
    assert expected == 2 * 4 * (2 * 4 * 16 + 4 * 16 + 4 * 8) + 8 * 4
    for found in processes:
        for entry in found["plain"]["log"]:
            assert entry["gather_mb_per_step"] == round(expected / 2**20, 4)
        assert f"sends about {expected / 2**20:.2f} MB to the others" in found["plain"]["text"]
        assert "2 process(es) x batch 4: negatives per query = 7" in found["plain"]["text"]


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))
