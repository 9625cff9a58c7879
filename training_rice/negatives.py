"""Sources of negatives: gathering over processes, steps in chunks, a memory of past batches."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from modeling_rice import RiceModel
from modeling_rice.loss_rice import cosines
from modeling_rice.modeling_rice import RiceOutput

from .arguments import RiceTrainingArguments
from .gather import AllGather, exchanged_bytes
from .grad_cache import GradCache, average_gradients, refuse_text_term
from .memory_queue import MemoryQueue

_MB = 2**20


class NegativesTrainer(Trainer):
    """
    transformers' Trainer with the global batch of [`AllGather`], the steps of [`GradCache`] (`grad_cache_chunk`), the
    negatives of [`MemoryQueue`] (`memory_queue_size`) and a bounded temperature.

    Attributes:
        memory_queue: The memory queue or `None`; checkpoints must contain it.
    """

    _frozen: list[nn.Module] = []
    # Modules inside these that are still trained.
    _unfrozen: list[nn.Module] = []

    def __init__(self, model: RiceModel, args: RiceTrainingArguments, **kwargs):
        super().__init__(model, args, **kwargs)
        self.add_callback(_BoundTemperature())
        self._gather: AllGather | None = None
        self._logged = (0, 0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._gather = AllGather()
            model.set_gather(self._gather)
        self.memory_queue: MemoryQueue | None = None
        if args.memory_queue_size:
            self.memory_queue = MemoryQueue(args.memory_queue_size, model.config.projection_dim, args.device)
            model.set_memory(self.memory_queue)
        self._grad_cache: GradCache | None = None
        if args.grad_cache_chunk:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "grad_cache_chunk works with one process or data parallel ones (DDP), not where weights are "
                    "sharded; leave it out, or start without FSDP and DeepSpeed."
                )
            refuse_text_term(model.config)
            self._grad_cache = GradCache(args.grad_cache_chunk, self.accelerator.autocast, self._prepare_inputs)

    @property
    def negatives_per_query(self) -> int:
        """Number of other images in the contrast of each clip in one step. Accumulated steps do not add any."""
        return self.args.per_device_train_batch_size * self.args.world_size - 1

    def describe_negatives(self) -> list[str]:
        """Lines on processes, batch, negatives, exchanged bytes and memory."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        batch, config = args.per_device_train_batch_size, model.config
        line = f"{args.world_size} process(es) x batch {batch}: negatives per query = {self.negatives_per_query}"
        if args.memory_queue_size:
            line += f", and up to {args.memory_queue_size} from past batches"
        lines = [line]
        if args.world_size > 1:
            losses = exchanged_bytes(config, batch, args.world_size) / _MB
            weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / _MB
            lines.append(
                f"per step each process sends about {losses:.2f} MB to the others for the losses; gradients of "
                f"{weights:.1f} MB are averaged"
            )
        if args.grad_cache_chunk:
            lines += self._describe_chunks(model, batch)
        if args.gradient_accumulation_steps > 1:
            lines.append(
                f"warning: {args.gradient_accumulation_steps} accumulated steps average gradients and add no negatives"
                f"; for more negatives raise per_device_train_batch_size, with grad_cache_chunk if memory is short"
            )
        return lines

    def _describe_chunks(self, model: RiceModel, batch: int) -> list[str]:
        chunk = self.args.grad_cache_chunk
        kept = self._grad_cache.kept_bytes(model.config, batch, self.args.world_size)
        sizes = ", ".join(f"{size / _MB:.1f} MB for {name}" for name, size in kept.items())
        lines = [f"{-(-batch // chunk)} chunks of {chunk} pairs; memory beyond that of a chunk: at most {sizes}"]
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            lines.append(f"warning: the encoder's batch norms use chunks of {chunk}, not the batch")
        return lines

    def get_train_dataloader(self) -> DataLoader:
        placement = self.accelerator.device_placement
        # Chunks go to the device one by one.
        self.accelerator.device_placement = placement and self._grad_cache is None
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placement

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        if self._grad_cache is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._keep_frozen()
        unwrapped, steps = self.accelerator.unwrap_model(model), self.current_gradient_accumulation_steps
        output = self._grad_cache(unwrapped, inputs, lambda loss: self.accelerator.backward(loss / steps))
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            average_gradients(unwrapped)
        # Here, because the chunks' memory is free again.
        output.logits_per_video = cosines(output.video_embeds, output.image_embeds)
        products = inputs.get("product_ids")
        self._record(output, None if products is None else products.to(output.video_embeds.device))
        return output.loss.detach() / steps

    def _keep_frozen(self) -> None:
        """Restores eval mode of frozen modules, because Trainer puts the whole model in training mode."""
        for module in self._frozen:
            module.eval()
        for module in self._unfrozen:
            module.training = True

    def _record(self, output: RiceOutput, product_ids: Tensor | None) -> None:
        """Hook that receives the losses and logits of each batch."""

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._gather is not None:
            sent, step = self._logged
            steps = max(self.state.global_step - step, 1)
            logs["gather_mb_per_step"] = round((self._gather.bytes_sent - sent) / steps / _MB, 4)
            self._logged = (self._gather.bytes_sent, self.state.global_step)
        super().log(logs, *args, **kwargs)


class _BoundTemperature(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.bound_logit_scale()
