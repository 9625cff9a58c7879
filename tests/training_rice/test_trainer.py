"""The trainer on a dozen pairs held in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data_rice.collator import RiceCollator
from evaluation_rice.fusion import ALIGNMENT_WEIGHTS
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, ModelRetriever, all_scores
from modeling_rice.scoring_rice import FusionWeights, fuse
from training_rice.arguments import RiceTrainingArguments
from training_rice.averaging import AVERAGED_FILE
from training_rice.trainer import LOSS_TERMS, RiceTrainer

# Of a model without text.
TERMS = ("contrastive_loss", "matching_loss", "reconstruction_loss")


class Recorder:
    """A collator that keeps its batches."""

    def __init__(self, collator: RiceCollator):
        self.collator = collator
        self.batches = []

    def __call__(self, rows):
        self.batches.append(self.collator(rows))
        return self.batches[-1]


@pytest.fixture
def make_trainer(make_model, processor, pairs, validation, tmp_path):
    """A function that builds a trainer; settings of the model first, then training arguments."""

    def make(settings: dict | None = None, model=None, validate: bool = False, **overrides) -> RiceTrainer:
        arguments = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            **overrides,
        }
        return RiceTrainer(
            model=model or make_model(settings),
            args=RiceTrainingArguments(**arguments),
            train_dataset=pairs,
            eval_dataset=validation if validate else None,
            data_collator=Recorder(RiceCollator(processor)),
            eval_collator=RiceCollator(processor),
            processing_class=processor,
        )

    return make


def logged(trainer: RiceTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def gradients(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


class TestLosses:
    def test_each_under_its_own_name(self, make_trainer, make_model):
        trainer = make_trainer(learning_rate=0.0)
        trainer.train()
        entries = logged(trainer)
        assert len(entries) == 2
        model = make_model().train()
        for entry, batch in zip(entries, trainer.data_collator.batches, strict=False):
            output = model(**batch)
            assert entry["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
            for name in TERMS:
                assert entry[name] == pytest.approx(output[name].item(), rel=1e-4, abs=2e-6)
            assert entry["logit_scale"] == pytest.approx(100.0)

    def test_mean_over_the_logging_interval(self, make_trainer):
        every = make_trainer(learning_rate=0.0, max_steps=4)
        every.train()
        pairwise = make_trainer(learning_rate=0.0, max_steps=4, logging_steps=2)
        pairwise.train()
        singles = logged(every)
        for i, entry in enumerate(logged(pairwise)):
            for name in ("loss", *TERMS):
                mean = (singles[2 * i][name] + singles[2 * i + 1][name]) / 2
                assert entry[name] == pytest.approx(mean, rel=1e-4, abs=2e-6)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"use_decoder": False}, {"contrastive_loss"}),
            ({"use_reconstruction": False}, {"contrastive_loss", "matching_loss"}),
        ],
    )
    def test_model_without_a_part(self, make_trainer, make_model, changes, expected):
        trainer = make_trainer(model=make_model(**changes))
        trainer.train()
        assert set(LOSS_TERMS) & logged(trainer)[0].keys() == expected
        assert ("PMD" in trainer.describe()) == ("matching_loss" in expected)

    def test_accumulation_averages(self, make_trainer, make_model):
        settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
        trainer = make_trainer(gradient_accumulation_steps=2, lr_scheduler_type="constant", **settings)
        # Or transformers would scale the loss by the number of processes as soon as a batch has labels.
        assert trainer.model_accepts_loss_kwargs is False
        trainer.train()
        model = make_model()
        start, (first, second) = copy_of(model), trainer.data_collator.batches[:2]
        for name, gradient in gradients(model, first).items():
            expected = start[name] - (gradient + gradients(model, second)[name]) / 2
            torch.testing.assert_close(trainer.model.state_dict()[name], expected, rtol=1e-5, atol=1e-5)
        (entry,) = logged(trainer)
        for name in ("loss", *TERMS):
            mean = (model(**first)[name] + model(**second)[name]) / 2
            assert entry[name] == pytest.approx(mean.item(), rel=1e-4, abs=2e-6)

    def test_batch_too_small_for_the_negatives(self, make_trainer, make_model):
        trainer = make_trainer(model=make_model(num_hard_negatives=3), per_device_train_batch_size=3)
        with pytest.raises(ValueError, match="global batch of at least 4, got 3"):
            trainer.train()


class TestDescription:
    def test_numbers(self, make_trainer):
        text = make_trainer().describe()
        assert "ICL + PMD + PFR" in text
        assert "12 pairs" in text
        assert "1 process(es) x batch 4: negatives per query = 3" in text
        assert "warning" not in text

    def test_accumulation_does_not_enlarge_the_batch(self, make_trainer):
        text = make_trainer(gradient_accumulation_steps=4).describe()
        assert "negatives per query = 3" in text
        assert "warning: 4 accumulated steps average gradients and add no negatives" in text


class TestOptimizer:
    def test_encoder_has_its_own_rate(self, make_trainer):
        trainer = make_trainer(learning_rate=1e-2, vision_learning_rate=1e-4, weight_decay=0.1)
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        seen = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                seen.append(name)
                assert group["lr"] == (1e-4 if name.startswith("vision_model.") else 1e-2), name
                if name.endswith("bias") or "norm" in name:
                    assert group["weight_decay"] == 0.0, name
                elif name.endswith("proj.weight"):
                    assert group["weight_decay"] == 0.1, name
        assert sorted(seen) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)

    def test_both_rates_are_scheduled(self, make_trainer):
        trainer = make_trainer(
            learning_rate=1e-2, vision_learning_rate=1e-4, max_steps=2, lr_scheduler_type="linear", warmup_steps=0
        )
        trainer.train()
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 1e-4}
        assert all(group["lr"] == 0.0 for group in trainer.optimizer.param_groups)

    def test_without_it_one_rate(self, make_trainer):
        assert {group["lr"] for group in make_trainer().create_optimizer().param_groups} == {5e-5}

    def test_frozen_encoder_is_unchanged(self, make_trainer, resnet_settings):
        """Its batch norms neither, which would need no gradient to move."""
        trainer = make_trainer(resnet_settings, freeze_vision=True, vision_learning_rate=1.0, learning_rate=1e-2)
        before = copy_of(trainer.model)
        trainer.train()
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert not [name for name in moved if name.startswith("vision_model.")]
        assert "visual_projection.weight" in moved
        assert any(name.startswith("decoder.") for name in moved)

    def test_unfrozen_encoder_is_trained(self, make_trainer, resnet_settings):
        trainer = make_trainer(resnet_settings, learning_rate=1e-2)
        before = copy_of(trainer.model)
        trainer.train()
        for name, value in trainer.model.vision_model.state_dict().items():
            assert not torch.equal(value, before[f"vision_model.{name}"]), name


class TestOrdinaryArguments:
    """What TrainingArguments offer for speed and memory changes no loss beyond rounding."""

    @pytest.mark.parametrize(
        ("arguments", "tolerance"),
        [
            ({"bf16": True}, 5e-2),
            ({"optim": "adamw_torch_fused"}, 1e-4),
            ({"activation_checkpointing": True}, 1e-5),
            ({"activation_checkpointing": True, "grad_cache_chunk": 2}, 1e-4),
            pytest.param({"torch_compile": True}, 1e-4, marks=pytest.mark.slow),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_same_losses(self, make_trainer, arguments, tolerance):
        runs = []
        for words in ({}, arguments):
            trainer = make_trainer(learning_rate=1e-3, **words)
            trainer.train()
            runs.append([entry["loss"] for entry in logged(trainer)])
        assert runs[1] == pytest.approx(runs[0], rel=tolerance)

    @pytest.mark.gpu
    @pytest.mark.parametrize("arguments", [{"tf32": True}, {"fp16": True}, {"bf16": True, "torch_compile": True}])
    def test_on_a_gpu(self, make_trainer, arguments):
        runs = []
        for words in ({}, arguments):
            trainer = make_trainer(learning_rate=1e-3, use_cpu=False, **words)
            trainer.train()
            runs.append([entry["loss"] for entry in logged(trainer)])
        assert runs[1] == pytest.approx(runs[0], rel=0.1)


class TestAveragedWeights:
    def test_evaluated_and_kept(self, make_trainer, validation, monkeypatch, tmp_path):
        """Validation sees the average, training goes on with the weights, and the run ends with the best average."""
        scores, seen = iter([0.5, 0.9, 0.3]), []

        def validate(self, prefix):
            seen.append(copy_of(self.model))
            return {f"{prefix}_fused_R@1": next(scores)}

        monkeypatch.setattr(RiceTrainer, "_validate", validate)
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(
            validate=True, max_steps=3, learning_rate=1e-2, ema_decay=0.9, load_best_model_at_end=True, **every
        )
        trainer.train()
        name = "visual_projection.weight"
        for step, values in zip((2, 3), seen[1:], strict=True):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            assert torch.equal(load_file(folder / AVERAGED_FILE)[name], values[name])
            assert not torch.equal(load_file(folder / "model.safetensors")[name], values[name])
        assert torch.equal(trainer.model.state_dict()[name], seen[1][name])
        other = make_trainer(validate=True, max_steps=3, ema_decay=0.9, load_best_model_at_end=True, **every)
        other.load_trained(tmp_path / "run" / "checkpoint-3")
        for name, value in other.model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name

    def test_kept_without_validation(self, make_trainer, tmp_path):
        trainer = make_trainer(ema_decay=0.9, save_strategy="steps", save_steps=2, learning_rate=1e-2)
        trainer.train()
        averaged = load_file(tmp_path / "run" / "checkpoint-2" / AVERAGED_FILE)
        for name, value in averaged.items():
            assert torch.equal(trainer.model.state_dict()[name], value), name


class TestEvaluation:
    def test_keys_and_fusion_weight(self, make_trainer):
        trainer = make_trainer(validate=True, eval_strategy="steps", eval_steps=2)
        trainer.train()
        metrics = trainer.evaluate()
        for kind in ("embedding", "matching", "fused"):
            for k in (1, 3, 5, 10):
                assert 0 <= metrics[f"eval_{kind}_R@{k}"] <= 1
        assert metrics["eval_fused_R@10"] == 1.0
        assert trainer.model.config.fusion_weight == metrics["eval_fusion_weight"] > 0
        assert trainer.model.config.ranking == "fused"
        trainer.model.config.ranking = "matching"
        trainer.evaluate()
        assert trainer.model.config.ranking == "matching"
        assert any("eval_fused_R@1" in entry for entry in trainer.state.log_history)

    def test_without_decoder(self, make_trainer, make_model):
        trainer = make_trainer(model=make_model(use_decoder=False), validate=True, eval_strategy="steps", eval_steps=2)
        trainer.train()
        metrics = trainer.evaluate()
        assert "eval_embedding_R@1" in metrics
        assert not [name for name in metrics if "matching" in name or "fus" in name]
        assert trainer.args.metric_for_best_model == "eval_embedding_R@1"
        assert trainer.args.greater_is_better is True

    @pytest.mark.parametrize("use_decoder", [False, True])
    def test_the_weight_of_an_alignment_is_fitted_and_kept(self, make_trainer, make_model, validation, use_decoder):
        model = make_model(alignment_weight=1.0, use_decoder=use_decoder)
        trainer = make_trainer(model=model, validate=True)
        assert trainer.args.metric_for_best_model == "eval_fused_R@1" and "alignment_weight" in trainer.fitted_fields
        metrics = trainer.evaluate()
        assert metrics["eval_alignment_weight"] == model.config.alignment_weight in ALIGNMENT_WEIGHTS
        assert model.config.ranking == "fused" and ("eval_fusion_weight" in metrics) == use_decoder
        queries, gallery, scope = validation
        task = RetrievalTask.from_datasets(queries, gallery, scope)
        model.eval()
        scores = all_scores(ModelRetriever(model, trainer.eval_collator), task, queries, gallery, Loading(8, 0, True))
        weights = FusionWeights.of(model.config)
        hits = [int(fuse(values, weights).argmax()) in task.relevant_positions(i) for i, values in scores.items()]
        assert metrics["eval_fused_R@1"] == pytest.approx(sum(hits) / len(hits))

    @pytest.mark.parametrize("name", ["eval_fused_R@1", "eval_loss", "R@1", "embedding_R@2"])
    def test_a_metric_that_is_not_measured_is_refused_at_the_start(self, make_trainer, make_model, name):
        with pytest.raises(ValueError, match=f"metric_for_best_model {name} is not measured for this model: choose"):
            make_trainer(model=make_model(use_decoder=False), validate=True, metric_for_best_model=name)
        make_trainer(validate=True, metric_for_best_model="matching_R@5")

    def test_fewer_queries(self, make_trainer, monkeypatch):
        trainer = make_trainer(validate=True, eval_max_queries=3)
        asked = []
        encode = RiceCollator.collate_queries
        monkeypatch.setattr(
            RiceCollator, "collate_queries", lambda self, rows: asked.extend(rows) or encode(self, rows)
        )
        trainer.evaluate()
        assert [row["clip_id"] for row in asked] == ["clip20", "clip22", "clip24"]

    def test_batch_norms(self, make_trainer, resnet_settings):
        trainer = make_trainer(resnet_settings, validate=True, per_device_eval_batch_size=4)
        trainer.train()
        before = copy_of(trainer.model)
        trainer.model.train()
        first = trainer.evaluate()
        assert trainer.model.training
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        again = trainer.evaluate()
        assert {name: value for name, value in again.items() if "R@" in name} == {
            name: value for name, value in first.items() if "R@" in name
        }

    def test_best_checkpoint_is_kept(self, make_trainer, monkeypatch, tmp_path):
        scores = iter([0.2, 0.9, 0.1, 0.3])
        kept = []

        def validate(self, prefix):
            kept.append(copy_of(self.model))
            return {f"{prefix}_fused_R@1": next(scores)}

        monkeypatch.setattr(RiceTrainer, "_validate", validate)
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(validate=True, max_steps=4, learning_rate=1e-2, load_best_model_at_end=True, **every)
        trainer.train()
        assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
            "checkpoint-2",
            "checkpoint-4",
        ]
        assert trainer.state.best_metric == 0.9
        assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, kept[1][name]), name
        assert not torch.equal(kept[1]["visual_projection.weight"], kept[3]["visual_projection.weight"])

    def test_end_of_a_trained_run(self, make_trainer, make_model, tmp_path):
        """What a run ends with can be taken from its checkpoints alone, also after the folder has moved."""
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(validate=True, max_steps=3, learning_rate=1e-2, load_best_model_at_end=True, **every)
        trainer.train()
        (tmp_path / "run").rename(tmp_path / "moved")
        other = make_trainer(validate=True, max_steps=3, load_best_model_at_end=True, **every)
        other.load_trained(tmp_path / "moved" / "checkpoint-3")
        for name, value in other.model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name
        assert other.state.global_step == 3


def test_checkpoint_holds_model_and_processor(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "rice"
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json", "optimizer.pt", "rng_state.pth"):
        assert (folder / name).is_file(), name
