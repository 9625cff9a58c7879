"""Which rows the trainer sees in which step: with each sampler, streamed or not, and after a restart."""

import pytest
from datasets import Dataset

from data_rice.collator import RiceCollator
from data_rice.lazy_rows import ArrowRows
from data_rice.samplers import build_sampler
from training_rice.arguments import DataArguments, RiceTrainingArguments
from training_rice.setup import load_views, read_texts
from training_rice.trainer import RiceTrainer


class Recorder:
    """A collator that keeps the ids of its rows."""

    def __init__(self, collator: RiceCollator):
        self.collator = collator
        self.batches: list[list[str]] = []

    def __call__(self, rows):
        self.batches.append([row["clip_id"] for row in rows])
        return self.collator(rows)


@pytest.fixture
def shop_pairs(pairs) -> Dataset:
    """The twelve pairs in three livestreams and two categories."""
    return pairs.map(lambda row, i: row | {"live_id": f"live{i % 3}", "category": "ab"[i < 3]}, with_indices=True)


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(rows, **overrides) -> RiceTrainer:
        arguments = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 4,
            **overrides,
        }
        return RiceTrainer(
            model=make_model(use_decoder=False),
            args=RiceTrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=Recorder(RiceCollator(processor)),
            processing_class=processor,
        )

    return make


CASES = [("same_live", False), ("class_balanced", False), ("random", True), ("same_live", True)]


@pytest.mark.parametrize(("kind", "streaming"), CASES)
def test_steps_follow_the_sampler_also_after_a_stop(make_trainer, shop_pairs, tmp_path, kind, streaming):
    """Three steps an epoch: the fourth and the continued fifth lie within the second epoch."""
    rows = ArrowRows(shop_pairs) if streaming else shop_pairs
    sampler = build_sampler(kind, shop_pairs, batch_size=4, seed=7)
    names = shop_pairs["clip_id"]
    expected = [[names[row] for row in sampler.order(epoch)] for epoch in range(3)]
    expected = [epoch[start : start + 4] for epoch in expected for start in (0, 4, 8)][:8]

    trainer = make_trainer(rows, batch_sampler=kind, seed=7)
    trainer.train()
    # The loader reads one batch ahead.
    assert trainer.data_collator.batches[:8] == expected
    assert len({tuple(batch) for batch in expected}) > 3

    again = make_trainer(rows, batch_sampler=kind, seed=7)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.data_collator.batches[:4] == expected[4:]


def test_same_live_steps_hold_one_livestream(make_trainer, shop_pairs):
    trainer = make_trainer(shop_pairs, batch_sampler="same_live", max_steps=3, save_strategy="no")
    assert "from 1.0 livestreams each; 3.0 other rows" in trainer.describe()
    trainer.train()
    lives = dict(zip(shop_pairs["clip_id"], shop_pairs["live_id"]))
    shown = [{lives[clip] for clip in batch} for batch in trainer.data_collator.batches[:3]]
    assert sorted(map(sorted, shown)) == [["live0"], ["live1"], ["live2"]]


def test_data_seed_decides_the_order(make_trainer, shop_pairs):
    sampler = build_sampler("class_balanced", shop_pairs, batch_size=4, seed=3, alpha=1.0)
    options = {"batch_sampler": "class_balanced", "class_balance_alpha": 1.0, "seed": 1, "data_seed": 3}
    trainer = make_trainer(shop_pairs, max_steps=3, save_strategy="no", **options)
    trainer.train()
    names = shop_pairs["clip_id"]
    assert sum(trainer.data_collator.batches, [])[:12] == [names[row] for row in sampler.order(0)]


def test_random_without_streaming_is_transformers_own(make_trainer, shop_pairs):
    trainer = make_trainer(shop_pairs, max_steps=3, save_strategy="no")
    assert "global batches" not in trainer.describe()
    trainer.train()
    assert sorted(sum(trainer.data_collator.batches[:3], [])) == sorted(shop_pairs["clip_id"])


def test_alpha_is_checked():
    with pytest.raises(ValueError, match=r"class_balance_alpha must lie in 0\.\.1, got 3"):
        RiceTrainingArguments(class_balance_alpha=3.0)


def test_rows_without_livestreams(make_trainer, pairs):
    rows = pairs.map(lambda row: row | {"live_id": ""})
    with pytest.raises(ValueError, match="have no live_id, which the same_live sampler needs"):
        make_trainer(rows, batch_sampler="same_live").train()


def test_views_and_texts_are_alike(tmp_path):
    """A streamed data set gives the tokenizer the same texts, and the trainer the same rows."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(b"not read here")
    gallery = [f'{{"gallery_id": "{name}", "image": "{name}.jpg", "title": "title {name}"}}' for name in "abc"]
    clips = [
        f'{{"query_id": "q{n}", "frames": ["a.jpg"], "gt_gallery_ids": ["{"abc"[n % 3]}"], "asr": "speech {n}"}}'
        for n in range(9)
    ]
    (tmp_path / "gallery.jsonl").write_text("\n".join(gallery))
    (tmp_path / "clips_train.jsonl").write_text("\n".join(clips))
    training = RiceTrainingArguments(per_device_train_batch_size=4, use_cpu=True, report_to="none")
    found = []
    for streaming in (False, True):
        data = DataArguments(dataset=str(tmp_path), cache_dir=str(tmp_path / "cache"), streaming=streaming)
        rows, _ = load_views(data, training)
        assert isinstance(rows, ArrowRows) == streaming
        found.append(([rows[i] for i in range(9)], read_texts(rows, data)))
    assert found[0] == found[1]
    assert len(found[0][1]) == 12
