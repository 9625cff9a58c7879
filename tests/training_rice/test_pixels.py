"""Batches of uint8 pictures train as batches of floats do."""

import pytest
import torch
from torch.utils.data import DataLoader

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator
from training_rice.arguments import DataArguments, RiceTrainingArguments
from training_rice.randomness import SeededCollator
from training_rice.trainer import RiceTrainer


@pytest.fixture
def train(make_model, processor, pairs, tmp_path):
    """A function that trains for three steps and returns the losses and the weights."""

    def run(pixels: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        arguments = RiceTrainingArguments(
            output_dir=str(tmp_path / pixels),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
        )
        collator = RiceCollator(processor, pixels=pixels)
        trainer = RiceTrainer(make_model(), arguments, pairs, collator, processing_class=processor)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.model.state_dict()

    return run


def test_uint8_pictures_train_as_floats_do(train):
    """The pairs hold clips of different lengths, so padding is among what must agree."""
    (floats, float_weights), (numbers, weights) = train("float"), train("uint8")
    assert len(floats) == 3 and numbers == pytest.approx(floats, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, float_weights[name], rtol=0, atol=2e-4)


def test_augmentation_is_a_function_of_seed_epoch_and_batch(processor, pairs):
    """Whoever loads it, and whatever was drawn before."""
    augmentation = ClipAugmentation(frame_drop=0.3)
    plain = RiceCollator(processor, sampling="random", augmentation=augmentation, decode="fast", pixels="uint8")

    def load(seed: int, epochs: list[int], num_workers: int) -> list[torch.Tensor]:
        collator = SeededCollator(plain, seed)
        loader = DataLoader(pairs, 4, collate_fn=collator, num_workers=num_workers, persistent_workers=num_workers > 0)
        batches = []
        for epoch in epochs:
            collator.set_epoch(epoch)
            batches.append(torch.stack([batch["pixel_values_videos"] for batch in loader]))
        return batches

    first, second = load(0, [0, 1], num_workers=0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, load(1, [0], num_workers=0)[0])
    # Workers that outlive the first epoch, and a run that starts in the second one.
    assert all(map(torch.equal, load(0, [0, 1], num_workers=2), (first, second)))
    assert torch.equal(load(0, [1], num_workers=0)[0], second)


def test_frame_dropping_is_an_augmentation():
    assert not DataArguments().augments
    assert DataArguments(augment_frame_drop=0.1).augments
    with pytest.raises(ValueError, match=r"augment_frame_drop must lie in 0\.0\.\.1\.0, got 2"):
        DataArguments(augment_frame_drop=2)
