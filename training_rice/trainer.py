"""transformers' Trainer, taught RICE's losses, its gather, and R@k on a validation split."""

import logging
import os
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import speed_metrics

from data_rice.collator import RiceCollator
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, ModelRetriever, validate
from modeling_rice import RiceModel

from .arguments import RiceTrainingArguments
from .gather import AllGather
from .optimizer import BertAdam, parameter_groups, published_parameter_groups, warmup_cosine

logger = logging.getLogger(__name__)

LOSS_TERMS = ("contrastive_loss", "matching_loss", "reconstruction_loss")


class RiceTrainer(Trainer):
    """
    Args:
        model: A [`RiceModel`].
        args: [`RiceTrainingArguments`].
        train_dataset: Pairs view.
        eval_dataset: `(queries view, gallery view, gallery scope)`; without it there is no validation.
        data_collator: For pairs.
        eval_collator: For queries and gallery.
        kwargs: As `Trainer`.
    """

    def __init__(
        self,
        model: RiceModel,
        args: RiceTrainingArguments,
        train_dataset: Dataset,
        data_collator: RiceCollator,
        eval_dataset: tuple[Dataset, Dataset, str] | None = None,
        eval_collator: RiceCollator | None = None,
        **kwargs,
    ):
        if args.metric_for_best_model in (None, "loss"):
            args.metric_for_best_model = "eval_fused_R@1" if model.decoder is not None else "eval_embedding_R@1"
            args.greater_is_better = True
        self.eval_views = eval_dataset
        self.eval_collator = eval_collator or data_collator
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_count = 0
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset[0] if eval_dataset else None,
            **kwargs,
        )
        if args.freeze_vision:
            model.vision_model.requires_grad_(False)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            model.set_gather(AllGather())

    @property
    def negatives_per_query(self) -> int:
        """Images each clip is contrasted with in one step, besides its own. Accumulated steps do not add to them."""
        return self.args.per_device_train_batch_size * self.args.world_size - 1

    def describe(self) -> str:
        """One paragraph on what is about to run, with the numbers people confuse."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        terms = ["ICL"] + ["PMD"] * (model.decoder is not None) + ["PFR"] * (model.reconstruction_head is not None)
        lines = [
            f"{' + '.join(terms)}, {sum(p.numel() for p in model.parameters()):,} parameters, on "
            f"{len(self.train_dataset):,} pairs",
            f"{args.world_size} process(es) x batch {args.per_device_train_batch_size}: "
            f"negatives per query = {self.negatives_per_query}",
        ]
        if args.gradient_accumulation_steps > 1:
            lines.append(
                f"warning: {args.gradient_accumulation_steps} accumulated steps average gradients and add no negatives"
            )
        return "\n".join(lines)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but vectors and scalars: biases, norms (whatever their encoder calls them) and the temperature."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Groups for encoder and rest, each with and without decay (none on biases and norms)."""
        model, args = model or self.model, self.args
        rates = (args.learning_rate, args.vision_learning_rate, args.weight_decay)
        if self.optimizer is None and args.published_optimizer:
            if args.vision_learning_rate is None:
                rates = (args.learning_rate, args.learning_rate, args.weight_decay)
            self.optimizer = BertAdam(published_parameter_groups(model, *rates))
        elif self.optimizer is None and args.vision_learning_rate is not None:
            decayed = set(self.get_decay_parameter_names(model))
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            groups = parameter_groups(
                model, *rates, is_vision=lambda name: "vision_model." in name, is_decayed=decayed.__contains__
            )
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of the arguments, or the one that belongs to the published optimiser."""
        if self.lr_scheduler is None and self.args.published_optimizer:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, partial(warmup_cosine, total_steps=num_training_steps)
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.args.freeze_vision:
            # Trainer puts the whole model in training mode, where batch norms go on moving and dropout goes on.
            self.accelerator.unwrap_model(model).vision_model.eval()
        output = model(**inputs, return_loss=True)
        for name in LOSS_TERMS:
            # By attribute: as a mapping the output has no entry for a term that the model lacks.
            if (value := getattr(output, name)) is not None:
                # Summed on the device: reading the value here would stall it at every step.
                self._loss_sums[name] = self._loss_sums.get(name, 0.0) + value.detach()
        self._loss_count += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._loss_count:
            for name, total in self._loss_sums.items():
                mean = self.accelerator.reduce(total / self._loss_count, reduction="mean")
                logs[name] = round(mean.item(), 6)
            logs["logit_scale"] = round(self.accelerator.unwrap_model(self.model).logit_scale.exp().item(), 4)
            self._loss_sums, self._loss_count = {}, 0
        super().log(logs, *args, **kwargs)

    def load_trained(self, checkpoint: str | os.PathLike) -> None:
        """Takes the weights that a run ends with, the best or the last, from the checkpoint after its last step."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            # Looked for beside the last one, since the folder may have moved.
            checkpoint = os.path.join(os.path.dirname(checkpoint), os.path.basename(self.state.best_model_checkpoint))
        self._load_from_checkpoint(checkpoint)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        R@k on the validation split by the project's protocol, on the first process; the others wait for the figures.

        Returns:
            `{prefix}_embedding_R@1`, `{prefix}_matching_R@1`, `{prefix}_fused_R@1` and so on, in 0..1, and
            `{prefix}_fusion_weight`, which is fitted on this very split.
        """
        start = time.time()
        shared: list[dict[str, float] | None] = [None]
        if self.is_world_process_zero():
            shared[0] = self._validate(metric_key_prefix)
        if self.args.world_size > 1:
            dist.broadcast_object_list(shared, src=0)
        metrics = shared[0]
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_views[0])))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validate(self, prefix: str) -> dict[str, float]:
        model: Any = self.accelerator.unwrap_model(self.model)
        queries, gallery, scope = self.eval_views
        limit = self.args.eval_max_queries
        if limit is not None and limit < len(queries):
            queries = queries.select([i * len(queries) // limit for i in range(limit)])
        task = RetrievalTask.from_datasets(queries, gallery, scope)
        retriever = ModelRetriever(model, self.eval_collator)
        loading = Loading(self.args.per_device_eval_batch_size, self.args.dataloader_num_workers, quiet=True)
        failures: list[dict[str, str]] = []
        books, weight = validate(retriever, task, queries, gallery, loading=loading, failures=failures)
        metrics = {}
        if failures:
            metrics[f"{prefix}_unreadable_media"] = float(len(failures))
            first = failures[0]
            logger.warning(
                "%d failures in validation count as misses; the first: %s (%s).",
                len(failures),
                first["id"],
                first["reason"],
            )
        if weight is not None:
            model.config.fusion_weight = weight
            metrics[f"{prefix}_fusion_weight"] = weight
        for kind, rankings in books.items():
            for name, value in rankings.summary().items():
                if isinstance(value, float):
                    metrics[f"{prefix}_{kind}_{name}"] = value
        return metrics
