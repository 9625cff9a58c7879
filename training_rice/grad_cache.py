"""
GradCache: a training step on a large batch in the memory of a small one (Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup, RepL4NLP 2021).

1. Encode the batch chunk by chunk without a graph. Keep what the losses of all pairs need: embeddings, the class
   token's row of each image in the decoder, and the score of each clip with each image.
2. Compute the losses from these, a block of rows at a time, and their gradient with respect to each kept number.
3. Encode each chunk again, with a graph and the random state of step 1, and backpropagate the gradient of its numbers.

The gradient equals that of the plain step, because only the kept numbers connect the chunks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling_rice import RiceConfig, RiceModel
from modeling_rice.features_rice import require_pairs
from modeling_rice.modeling_rice import RiceOutput

Batch = dict[str, Tensor]


class GradCache:
    """
    Loss and gradients of `model(**batch).loss`, computed in chunks.

    Memory, with N pairs per chunk, b pairs per process and B in total, embeddings of width D and a decoder of width d:
    the memory of a plain step on N pairs; the kept numbers, `2 (b + B) (2 D + d)` with their gradients; logits of N
    rows, about a dozen times `N B`; and with a decoder `3 b B` scores (`2 B B` more on several processes) and
    `pair_memory` bytes of intermediate results. [`kept_bytes`] gives the sum. No tokens are kept. The third step
    computes the tokens of the chosen pairs again; there only pairs with a gradient go through the whole decoder.

    Time: one forward pass more than the plain step. PFR needs image and clip at once for its gradient, which adds a
    forward and a backward pass of the images. Mined negatives are known only after all clips are encoded, so every
    pair is scored once without a graph.

    Batch norms use chunks instead of the batch, and update their running statistics once per chunk.

    Args:
        chunk_size: Pairs N per chunk, >= 1. The last chunk may be smaller.
        autocast: Returns the context of the computations. It is entered again for each graph, because the weights that
            autocast casts and caches belong to one graph.
        prepare: Applied to each chunk before encoding, so that the batch can stay on another device in another format.
        pair_memory: Bytes for intermediate results of the decoder's pairs. At least one image per chunk of clips is
            processed at a time.
    """

    def __init__(
        self,
        chunk_size: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        prepare: Callable[[Batch], Batch] = dict,
        pair_memory: int = 256 * 2**20,
    ):
        if chunk_size < 1:
            raise ValueError(f"grad_cache_chunk must be at least 1, got {chunk_size}.")
        self.chunk_size, self.pair_memory = chunk_size, pair_memory
        self.autocast, self.prepare = autocast, prepare

    def __call__(
        self, model: RiceModel, batch: Batch, backward: Callable[[Tensor], None] = torch.autograd.backward
    ) -> RiceOutput:
        """
        Adds the gradients of `backward(model(**batch).loss)` to the parameters. In data parallel training, pass the
        unwrapped model and call [`average_gradients`] after the last batch of an update.

        Args:
            batch: Inputs of `RiceModel.forward`.
            backward: Gets parts of the loss, which it may scale before their backward pass.

        Returns:
            Loss and its terms, embeddings and matching logits, without a graph. `logits_per_video` is missing.

        Raises:
            ValueError: it is called inside autocast, or `forward` raises it.
        """
        device, size = model.device, len(batch["pixel_values"])
        if torch.is_autocast_enabled(device.type):
            raise ValueError("GradCache must be called outside autocast; pass the context as `autocast`.")
        refuse_text_term(model.config)
        require_pairs(batch["pixel_values"], batch["pixel_values_videos"])
        chunks = [
            {name: value[start : start + self.chunk_size] for name, value in batch.items() if value is not None}
            for start in range(0, size, self.chunk_size)
        ]
        kept = self._encode(model, chunks)
        random_state = _RandomState(device)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        output, factor = self._losses(model, kept, batch.get("product_ids"), backward)
        reconstruction = self._backward_clips(model, chunks, kept, factor)
        self._backward_images(model, chunks, kept)
        if reconstruction is not None:
            output.reconstruction_loss = reconstruction
            output.loss = output.loss + model.config.reconstruction_loss_weight * reconstruction
        random_state.restore()
        with torch.no_grad():
            # The second forward pass of a chunk must not update running statistics again.
            for buffer, value in buffers:
                buffer.copy_(value)
        return output

    @torch.no_grad()
    def _encode(self, model: RiceModel, chunks: list[Batch]) -> "_Kept":
        """The first pass."""
        kept = _Kept()
        image_embeds, video_embeds, class_states, scores = [], [], [], []
        with self.autocast():
            for chunk in map(self.prepare, chunks):
                kept.image_random.append(_RandomState(model.device))
                images = model.image_tokens(**chunk)
                image_embeds.append(images.embeds)
                if images.states is not None:
                    kept.state_dtype = images.states.dtype
                    # A copy, since a view would keep all tokens.
                    class_states.append(_single(images.states[:, 0]))
                del images
            if class_states:
                kept.class_states = torch.cat(class_states).requires_grad_()
                with torch.enable_grad():
                    kept.all_states = model.gather(kept.class_states)
            for chunk in map(self.prepare, chunks):
                kept.clip_random.append(_RandomState(model.device))
                clips = model.clip_tokens(**chunk)
                video_embeds.append(clips.embeds)
                if clips.keys is not None:
                    blocks = self._image_blocks(model, clips.keys, len(kept.all_states))
                    states, keys_values = kept.all_states.to(kept.state_dtype), (clips.keys, clips.values, clips.mask)
                    rows = [model.decoder.score_pairs(states[block], *keys_values) for block in blocks]
                    scores.append(_single(torch.cat(rows, dim=1)))
                    del keys_values
                del clips
        kept.image_embeds = torch.cat(image_embeds).requires_grad_()
        kept.video_embeds = torch.cat(video_embeds).requires_grad_()
        kept.scores = torch.cat(scores).requires_grad_() if scores else None
        return kept

    def _image_blocks(self, model: RiceModel, keys: Tensor, num_images: int) -> list[slice]:
        """Ranges of images whose pairs with the chunk's clips fit into `pair_memory`, including the graph."""
        config = model.config
        width, heads = config.decoder_hidden_size, config.decoder_num_heads
        hidden = config.decoder_intermediate_size or 4 * width
        bytes_per_pair = 4 * (10 * width + 4 * hidden + 2 * heads * keys.shape[1])
        step = max(1, self.pair_memory // (bytes_per_pair * len(keys)))
        return [slice(start, min(start + step, num_images)) for start in range(0, num_images, step)]

    def kept_bytes(self, config: RiceConfig, batch_size: int, world_size: int = 1) -> dict[str, int]:
        """
        Bytes that a process needs beyond a plain step on one chunk (single precision), by purpose.

        Args:
            config: Config of the model.
            batch_size: Pairs per process.
            world_size: Number of processes.
        """
        whole = batch_size * world_size
        width = config.decoder_hidden_size if config.use_decoder else 0
        # Scaled, masked and exponentiated logits and their gradients, in both directions.
        kept = {
            "embeddings": 2 * 4 * (batch_size + whole) * (2 * config.projection_dim + width),
            "logits": 12 * 4 * min(self.chunk_size, batch_size) * whole,
        }
        if config.use_decoder:
            kept["scores"] = 4 * (3 * batch_size * whole + (2 * whole**2 if world_size > 1 else 0))
            kept["pairs"] = self.pair_memory
        return kept

    def _losses(
        self, model: RiceModel, kept: "_Kept", product_ids: Tensor | None, backward: Callable[[Tensor], None]
    ) -> tuple[RiceOutput, Tensor]:
        """The second pass: gradients of the kept numbers, and the factor for the gradient of PFR."""
        config, size = model.config, len(kept.image_embeds)
        products = None if product_ids is None else model.gather(product_ids.to(model.device))
        sources = [tensor for tensor in (kept.image_embeds, kept.video_embeds, kept.scores) if tensor is not None]
        gathered = [model.gather(tensor) for tensor in sources]
        images, clips = (tensor.detach().requires_grad_() for tensor in gathered[:2])
        matching = None if kept.scores is None else _Matching(gathered[2].detach())
        # A placeholder for the loss of the third pass, to find the scaling that `backward` applies.
        reconstruction = torch.zeros((), device=images.device, dtype=images.dtype, requires_grad=True)
        output = RiceOutput(
            loss=torch.zeros((), device=images.device, dtype=images.dtype),
            image_embeds=kept.image_embeds.detach(),
            video_embeds=kept.video_embeds.detach(),
        )
        output.contrastive_loss = torch.zeros_like(output.loss)
        first = model.gather.rank * size
        for start in range(0, size, self.chunk_size):
            stop = min(start + self.chunk_size, size)
            rows, share = slice(first + start, first + stop), (stop - start) / size
            with self.autocast():
                term = share * model.contrastive_loss(images, clips, products, rows)
                loss = (
                    config.contrastive_loss_weight * term + config.reconstruction_loss_weight * share * reconstruction
                )
                output.contrastive_loss += term.detach()
                if matching is not None:
                    term = share * matching.loss_of(model, images, clips, products, rows)
                    matching.loss = matching.loss + term.detach()
                    loss = loss + config.matching_loss_weight * term
            backward(loss)
            output.loss += loss.detach()
            if matching is not None:
                matching.add_gradients()
        leaves = [images.grad, clips.grad, *([] if matching is None else [matching.gradient])]
        torch.autograd.backward(gathered, leaves)
        if matching is not None:
            own = config.matching_scale * kept.scores.detach()[:, first : first + size]
            output.matching_loss = matching.loss
            output.matching_logits = torch.cat(matching.logits) if matching.logits else own
            output.matching_indices = torch.cat(matching.indices) if matching.indices else None
        if model.memory is not None and model.training:
            model.memory.push(images.detach(), clips.detach(), products)
        return output, reconstruction.grad

    def _backward_clips(self, model: RiceModel, chunks: list[Batch], kept: "_Kept", factor: Tensor) -> Tensor | None:
        """The third pass for clips and for the terms of pairs: scores and PFR. Returns the loss of PFR."""
        size, start, reconstruction = len(kept.video_embeds), 0, None
        all_states = None if kept.all_states is None else kept.all_states.detach().requires_grad_()
        for index, chunk in enumerate(map(self.prepare, chunks)):
            images = None
            with self.autocast():
                if model.reconstruction_head is not None:
                    kept.image_random[index].restore()
                    images = model.image_tokens(**chunk)
                kept.clip_random[index].restore()
                clips = model.clip_tokens(**chunk)
            rows = slice(start, start + len(clips.embeds))
            start = rows.stop
            outputs, gradients = [clips.embeds], [kept.video_embeds.grad[rows]]
            if all_states is not None:
                cached = [_single(tensor).requires_grad_() for tensor in (clips.keys, clips.values)]
                self._backward_pairs(model, kept, all_states, cached, clips.mask, (clips.keys.dtype, rows))
                outputs += [clips.keys, clips.values]
                gradients += [tensor.grad for tensor in cached]
            if model.reconstruction_head is not None:
                with self.autocast():
                    term = model.reconstruction_loss(images, clips) * (len(clips.embeds) / size)
                reconstruction = term.detach() if reconstruction is None else reconstruction + term.detach()
                outputs.append(term)
                gradients.append(factor)
            _backward(outputs, gradients)
        if all_states is not None:
            torch.autograd.backward(kept.all_states, all_states.grad)
        return reconstruction

    def _backward_pairs(
        self,
        model: RiceModel,
        kept: "_Kept",
        all_states: Tensor,
        cached: list[Tensor],
        mask: Tensor,
        chunk: tuple[torch.dtype, slice],
    ) -> None:
        """Gradients of the scores of a chunk's clips, down to the images' states and the clips' keys and values."""
        dtype, rows = chunk
        for block in self._image_blocks(model, cached[0], len(all_states)):
            gradient = kept.scores.grad[rows, block]
            with self.autocast():
                states = all_states[block].to(kept.state_dtype)
                # All of them, to repeat the dropout of the first pass.
                contexts = model.decoder.pair_contexts(states, *(tensor.to(dtype) for tensor in cached), mask)
                if model.config.matching_negatives == "hardest":
                    chosen = gradient != 0
                    contexts, gradient = contexts[chosen], gradient[chosen]
                    states = states.expand(len(mask), -1, -1)[chosen]
                scores = model.decoder.finish_pairs(states, contexts)
            torch.autograd.backward(scores, gradient.to(scores.dtype))

    def _backward_images(self, model: RiceModel, chunks: list[Batch], kept: "_Kept") -> None:
        """The third pass for images."""
        start = 0
        for index, chunk in enumerate(map(self.prepare, chunks)):
            kept.image_random[index].restore()
            with self.autocast():
                images = model.image_tokens(**chunk)
            rows = slice(start, start + len(images.embeds))
            start = rows.stop
            outputs, gradients = [images.embeds], [kept.image_embeds.grad[rows]]
            if images.states is not None:
                outputs.append(images.states[:, 0])
                gradients.append(kept.class_states.grad[rows])
            _backward(outputs, gradients)


def refuse_text_term(config: RiceConfig) -> None:
    """Raises `ValueError` for a model whose text loss and mining need the texts of all chunks."""
    if config.text_score_weight is not None:
        raise ValueError(
            "grad_cache_chunk does not support the score-level text term; leave out text_score_weight of the model "
            "(title and ASR tokens in the decoder do work), or grad_cache_chunk."
        )


@dataclass
class _Kept:
    """Results of the first pass: leaf tensors, whose gradients the second pass sets, and random states by chunk."""

    image_embeds: Tensor | None = None
    video_embeds: Tensor | None = None
    class_states: Tensor | None = None
    all_states: Tensor | None = None
    scores: Tensor | None = None
    state_dtype: torch.dtype = torch.float32
    image_random: list["_RandomState"] = field(default_factory=list)
    clip_random: list["_RandomState"] = field(default_factory=list)


class _Matching:
    """
    The matching loss of the second pass, block by block: its value, the gradient of all scores, and the logits and
    positions of mined pairs.
    """

    def __init__(self, scores: Tensor):
        self.scores, self.gradient = scores, torch.zeros_like(scores)
        self.loss: Tensor | float = 0.0
        self.logits: list[Tensor] = []
        self.indices: list[Tensor] = []

    def loss_of(self, model: RiceModel, images: Tensor, clips: Tensor, products: Tensor | None, rows: slice) -> Tensor:
        """The loss of the images and clips in some rows."""
        mined = model.mine_negatives(images, clips, products, rows)
        # Leaf tensors of a block's size, because the gradient of a slice would be as large as all scores.
        parts = (self.scores[:, rows].T, self.scores[rows])
        self._block = (rows, *(part.clone().requires_grad_() for part in parts))
        loss, logits = model.matching_loss(*self._block[1:], products, rows, mined)
        if mined is not None:
            self.logits.append(logits.detach())
            self.indices.append(mined[0])
        return loss

    def add_gradients(self) -> None:
        """Adds the gradients of the last block of [`loss_of`], after its backward pass."""
        rows, by_image, by_clip = self._block
        self.gradient[:, rows] += by_image.grad.T
        if by_clip.grad is not None:
            self.gradient[rows] += by_clip.grad


class _RandomState:
    """State of torch's generators that dropout on a device uses."""

    def __init__(self, device: torch.device):
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _single(tensor: Tensor) -> Tensor:
    """A copy in at least single precision, for summing many small gradients."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Backward pass from the outputs that require a gradient; with a frozen encoder some do not."""
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad]
    if pairs:
        outputs, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(
            outputs, [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients, strict=True)]
        )


def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """
    Replaces each gradient by its mean over processes. Data parallel training does this in its own backward passes,
    which [`GradCache`] bypasses. A parameter without a gradient on all processes stays without one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    used = used.to(parameters[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    parameters = [
        parameter for parameter, used_somewhere in zip(parameters, used.tolist(), strict=True) if used_somewhere
    ]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pending = [dist.all_reduce(parameter.grad, group=group, async_op=True) for parameter in parameters]
    for parameter, work in zip(parameters, pending, strict=True):
        work.wait()
        parameter.grad /= dist.get_world_size(group)
