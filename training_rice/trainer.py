"""transformers' Trainer with RICE's losses, its gather, and R@k on a validation split."""

import logging
import time
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import speed_metrics

from data_rice.collator import RiceCollator, failure_words
from data_rice.decoding import normalize_pixels
from data_rice.lazy_rows import LazyRows
from data_rice.samplers import GlobalBatchSampler, build_sampler
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading
from hub_rice.publishing import PublishingTrainer
from modeling_rice import RiceModel
from modeling_rice.modeling_rice import RiceOutput

from .alignment import fit_alignment
from .arguments import RiceTrainingArguments
from .compilation import compile_encoder, describe_compilation
from .monitor import StepClock, in_batch_accuracy, peak_memory_gb
from .negatives import NegativesTrainer
from .optimizer import (
    BertAdam,
    freeze,
    layer_factors,
    parameter_groups,
    published_parameter_groups,
    unfreeze_last_stage,
    warmup_cosine,
)
from .resumable import ResumableTrainer
from .stopping import outlive_signals
from .validation import metric_names, validate_together

logger = logging.getLogger(__name__)

# Fields of RiceConfig that validation fits: the weights and the ranking of scores.
FITTED_FIELDS = ("fusion_weight", "alignment_weight", "text_score_weight", "fused_text_weight", "ranking")
LOSS_TERMS = ("contrastive_loss", "matching_loss", "reconstruction_loss", "text_loss")


class RiceTrainer(ResumableTrainer, NegativesTrainer, PublishingTrainer):
    """
    Args:
        model: A [`RiceModel`].
        args: [`RiceTrainingArguments`].
        train_dataset: Pairs view, loaded or opened for streaming.
        eval_dataset: `(query view, gallery view, gallery scope)`; without it there is no validation.
        data_collator: Collator for pairs.
        eval_collator: Collator for queries and gallery.
        kwargs: Arguments of `Trainer`.
    """

    fitted_fields = FITTED_FIELDS

    def __init__(
        self,
        model: RiceModel,
        args: RiceTrainingArguments,
        train_dataset: Dataset | LazyRows,
        data_collator: RiceCollator,
        eval_dataset: tuple[Dataset, Dataset, str] | None = None,
        eval_collator: RiceCollator | None = None,
        **kwargs,
    ):
        if args.metric_for_best_model is None:
            has_fused = model.decoder is not None or model.alignment is not None
            args.metric_for_best_model = "eval_fused_R@1" if has_fused else "eval_embedding_R@1"
            args.greater_is_better = True
        if eval_dataset is not None:
            _check_metric(args.metric_for_best_model, metric_names(model))
        if args.unfreeze_last_stage:
            # Before any other change of the encoder.
            model.split_last_stage()
        self.eval_views = eval_dataset
        self.eval_collator = eval_collator or data_collator
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self.clock = StepClock()
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset[0] if eval_dataset else None,
            **kwargs,
        )
        self.add_callback(self.clock)
        compile_encoder(model, args, self.accelerator)
        self._frozen = freeze(model, ["vision_model"] * args.freeze_vision)
        trained = unfreeze_last_stage(model) if args.unfreeze_last_stage else []
        kept = freeze(model, args.freeze)
        self._frozen += kept
        self._unfrozen = [module for module in trained if not any(module in whole.modules() for whole in kept)]
        if trained and not any(weight.requires_grad for weight in model.vision_model.parameters()):
            raise ValueError("freeze names all that unfreeze_last_stage trains; leave one of them out.")
        if self.memory_queue is not None:
            self.stateful["memory_queue"] = self.memory_queue

    def describe(self) -> str:
        """A summary of the run: losses, parameters, data, batches, negatives and samplers."""
        model = self.accelerator.unwrap_model(self.model)
        terms = ["ICL"] + ["PMD"] * (model.decoder is not None) + ["PFR"] * (model.reconstruction_head is not None)
        lines = [
            f"{' + '.join(terms)}, {sum(p.numel() for p in model.parameters()):,} parameters, on "
            f"{len(self.train_dataset):,} pairs",
            *self.describe_negatives(),
            *describe_compilation(model, self.args),
        ]
        if self.args.unfreeze_last_stage:
            count = sum(weight.numel() for weight in model.vision_model.parameters() if weight.requires_grad)
            lines.append(f"of the encoder {count:,} parameters train, from {model.last_stage.entry} on")
        if self._has_own_sampler:
            lines.append(self._global_batch_sampler.describe())
        return "\n".join(lines)

    @cached_property
    def _global_batch_sampler(self) -> GlobalBatchSampler:
        args = self.args
        return build_sampler(
            args.batch_sampler,
            self.train_dataset,
            batch_size=args.train_batch_size * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            alpha=args.class_balance_alpha,
        )

    @property
    def _has_own_sampler(self) -> bool:
        return self.args.batch_sampler != "random" or isinstance(self.train_dataset, LazyRows)

    def _get_train_sampler(self, train_dataset=None):
        if not self._has_own_sampler:
            return super()._get_train_sampler(train_dataset)
        # Trainer cuts this order into batches, and accelerate distributes them to the processes in turn.
        return self._global_batch_sampler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of all weights except vectors and scalars: biases, norms (of any name) and the temperature."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Groups for encoder and rest, each with and without decay (none for biases and norms), or per layer."""
        model, args = model or self.model, self.args
        vision_rate = args.learning_rate if args.vision_learning_rate is None else args.vision_learning_rate
        rates = (args.learning_rate, vision_rate, args.weight_decay)
        if self.optimizer is None and args.published_optimizer:
            self.optimizer = BertAdam(published_parameter_groups(model, *rates))
        elif self.optimizer is None and (args.vision_learning_rate is not None or args.layer_decay is not None):
            decayed = set(self.get_decay_parameter_names(model))
            factors = layer_factors(model, args.layer_decay) if args.layer_decay is not None else {}
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            groups = parameter_groups(
                model,
                *rates,
                is_vision=lambda name: "vision_model." in name,
                is_decayed=decayed.__contains__,
                rate_factor=lambda name: factors.get(name, 1.0),
            )
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of the arguments, or that of the published optimiser."""
        if self.lr_scheduler is None and self.args.published_optimizer:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, partial(warmup_cosine, total_steps=num_training_steps)
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves inputs to the device, and normalises 8-bit pictures there."""
        return normalize_pixels(super()._prepare_inputs(inputs), self.processing_class)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        self._keep_frozen()
        output = model(**inputs, return_loss=True)
        self._record(output, inputs.get("product_ids"))
        return (output.loss, output) if return_outputs else output.loss

    def _record(self, output: RiceOutput, product_ids: torch.Tensor | None) -> None:
        """Adds a batch's losses and accuracies to the averages of the next log."""
        # By attribute, because the output as a mapping has no entry for missing terms.
        values = {name: getattr(output, name) for name in LOSS_TERMS}
        for name in ("contrastive", "matching"):
            logits = output.logits_per_video if name == "contrastive" else output.matching_logits
            values[f"{name}_accuracy"] = None if logits is None else in_batch_accuracy(logits, product_ids)
        for name, value in values.items():
            if value is not None:
                # Summed on the device, because reading the value here would stall every step.
                value = value.detach().float()
                finite = torch.isfinite(value)
                self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, torch.zeros_like(value))
                self._counts[name] = self._counts.get(name, 0.0) + finite.float()

    def get_batch_samples(self, *args, **kwargs):
        self.clock.start()
        samples = super().get_batch_samples(*args, **kwargs)
        self.clock.got(len(samples[0]))
        return samples

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._sums:
            own = {name: total / self._counts[name].clamp(min=1) for name, total in self._sums.items()}
            own["data_wait_share"] = torch.tensor(self.clock.waited / max(self.clock.seconds, 1e-9))
            device = self.args.device
            means = self.accelerator.reduce(torch.stack([value.to(device) for value in own.values()]), "mean")
            logs |= {name: round(value, 6) for name, value in zip(own, means.tolist(), strict=True)}
            logs["logit_scale"] = round(self.accelerator.unwrap_model(self.model).logit_scale.exp().item(), 4)
            clips = self.clock.batches * self.args.per_device_train_batch_size * self.args.world_size
            logs["clips_per_second"] = round(clips / max(self.clock.seconds, 1e-9), 3)
            logs["nonfinite_steps"] = self.guard.skipped
            logs |= {name: round(value, 3) for name, value in peak_memory_gb(device).items()}
            self._sums, self._counts = {}, {}
            self.clock.reset()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        R@k on the validation split by the project's protocol, with each process on a part of it.

        Returns:
            `{prefix}_embedding_R@1`, `{prefix}_matching_R@1`, `{prefix}_fused_R@1` and so on, in 0..1, and
            `{prefix}_fusion_weight`, which is fitted on the same split; with an alignment also
            `{prefix}_alignment_weight`, with a score-level text term `{prefix}_text_score_weight` and
            `{prefix}_fused_text_weight`. The weights are copied to the config, whose `ranking` becomes the fused score
            unless it names another.
        """
        start = time.time()
        with self.evaluation_weights():
            metrics = self._validate(metric_key_prefix)
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_views[0])))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def fit_alignment(self) -> None:
        """Fits the statistics of a model's alignment again, if it has one; validation does this too."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if model.alignment is None:
            return
        if not isinstance(self.data_collator, RiceCollator):
            logger.warning_once(
                "The statistics of the alignment stay as they are, because the data collator is no RiceCollator; "
                "call model.fit_alignment(images, frames) with your own batches."
            )
            return
        fit_alignment(model, self.train_dataset, self.data_collator, self._loading())

    def _loading(self) -> Loading:
        """Settings for reading rows outside of training steps."""
        loading = Loading(self.args.per_device_eval_batch_size, self.args.dataloader_num_workers, quiet=True)
        return replace(loading, worker_init=partial(outlive_signals, None)) if self.args.save_on_signal else loading

    def _validate(self, prefix: str) -> dict[str, float]:
        model: Any = self.accelerator.unwrap_model(self.model)
        queries, gallery, scope = self.eval_views
        limit = self.args.eval_max_queries
        if limit is not None and limit < len(queries):
            queries = queries.select([i * len(queries) // limit for i in range(limit)])
        task = RetrievalTask.from_datasets(queries, gallery, scope)
        self.fit_alignment()
        loading = self._loading()
        scores, weight, failures = validate_together(model, self.eval_collator, task, queries, gallery, loading)
        metrics = {}
        if failures:
            metrics[f"{prefix}_unreadable_media"] = float(len(failures))
            first = failures[0]
            logger.warning(
                "%d validation files could not be read; the first: %s (%s). A clip without readable frames is a miss.",
                len(failures),
                first["id"],
                failure_words(first),
            )
        if weight is not None:
            model.config.fusion_weight = weight
            # The value of an earlier fit would not fit this weight.
            model.config.fused_text_weight = scores.get("fused_text_weight")
            metrics[f"{prefix}_fusion_weight"] = weight
        if "alignment_weight" in scores:
            model.config.alignment_weight = scores["alignment_weight"]
        if weight is not None or "alignment_weight" in scores:
            model.config.ranking = model.config.ranking or "fused"
        if "text_score_weight" in scores:
            model.config.text_score_weight = scores["text_score_weight"]
        metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
        return metrics


def _check_metric(name: str, known: list[str]) -> None:
    if name.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model {name} is not measured for this model: choose one of "
            f"{', '.join(f'eval_{one}' for one in known)}."
        )
