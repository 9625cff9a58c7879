"""Time of a training step by part."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import Trainer, TrainerCallback

WARMUP_STEPS, STEPS = 3, 20
# Decoder functions that a training step calls.
_DECODER = ("encode_images", "encode_clips", "pair_contexts", "finish_pairs", "score_pairs", "positive_attention")
_COLLATE = "collate_seconds"
PARTS = ("data wait", "transfer", "encoder", "decoder", "losses", "backward", "gradient norm", "optimiser", "rest")


class PartTimer:
    """
    Seconds per part, each without its inner parts. On a GPU it synchronises at every change of part, which makes a
    step slightly slower.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._parts: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        self._turn()
        self._parts.append(part)

    def leave(self) -> None:
        self._turn()
        self._parts.pop()

    def timed(self, function: Callable, part: str) -> Callable:
        """The function with its time counted for a part."""

        def run(*args, **kwargs):
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run

    def reset(self) -> None:
        self._turn()
        self.seconds = dict.fromkeys(PARTS, 0.0)


class _TimedCollator:
    """A collator that stores its time in the batch, because it runs in another process."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        start = time.perf_counter()
        batch = self.collator(rows)
        return batch | {_COLLATE: torch.tensor(time.perf_counter() - start, dtype=torch.float64)}


class _Steps(TrainerCallback):
    def __init__(self, timer: PartTimer, collate: list[float]):
        self.timer, self.collate = timer, collate
        self.start = self.total = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.timer.enter("optimiser")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.timer.leave()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP_STEPS:
            self.timer.reset()
            self.collate.clear()
            self.start = time.perf_counter()
        self.total = time.perf_counter() - self.start
        control.should_save = control.should_evaluate = control.should_log = False
        control.should_training_stop = state.global_step >= WARMUP_STEPS + STEPS
        return control


@contextmanager
def _replaced(owner: object, name: str, value: Callable) -> Iterator[None]:
    former = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if former is None:
            delattr(owner, name)
        else:
            setattr(owner, name, former)


@contextmanager
def _measured(trainer: Trainer, timer: PartTimer, collate: list[float]) -> Iterator[_Steps]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    steps = _Steps(timer, collate)
    prepare = trainer._prepare_inputs

    def prepare_inputs(inputs):
        collate.append(inputs.pop(_COLLATE).item())
        return prepare(inputs)

    with ExitStack() as stack:
        for owner, name, function, part in (
            (trainer, "get_batch_samples", trainer.get_batch_samples, "data wait"),
            (trainer, "_prepare_inputs", prepare_inputs, "transfer"),
            (trainer, "compute_loss", trainer.compute_loss, "losses"),
            (trainer, "_clip_grad_norm", trainer._clip_grad_norm, "gradient norm"),
            (trainer, "_get_grad_norm", trainer._get_grad_norm, "gradient norm"),
            (torch.autograd, "backward", torch.autograd.backward, "backward"),
            *((model.decoder, name, getattr(model.decoder, name), "decoder") for name in _DECODER if model.decoder),
        ):
            stack.enter_context(_replaced(owner, name, timer.timed(function, part)))
        stack.enter_context(_replaced(trainer, "data_collator", _TimedCollator(trainer.data_collator)))
        vision = model.vision_model
        for hook in (
            vision.register_forward_pre_hook(lambda *_: timer.enter("encoder")),
            vision.register_forward_hook(lambda *_: timer.leave(), always_call=True),
        ):
            stack.callback(hook.remove)
        trainer.add_callback(steps)
        stack.callback(trainer.remove_callback, steps)
        yield steps


def profile_steps(trainer: Trainer) -> str:
    """
    Trains for some steps and measures their time by part. The first steps do not count, and nothing is saved.

    Args:
        trainer: A trainer that is ready to train; a model without a decoder has no time for it.

    Returns:
        A table of part, milliseconds per step and share; and the time of a loader worker per batch.

    Raises:
        ValueError: the run is too short.
    """
    timer, collate = PartTimer(trainer.args.device), []
    with _measured(trainer, timer, collate) as steps:
        trainer.train()
    counted = trainer.state.global_step - WARMUP_STEPS
    if counted < 1:
        raise ValueError(f"--profile needs more than {WARMUP_STEPS} steps; raise max_steps or num_train_epochs.")
    timer.seconds["rest"] = max(0.0, steps.total - sum(timer.seconds.values()))
    lines = [f"{'part of a step':<16}{'ms':>10}{'share':>8}"]
    lines += [
        f"{part:<16}{1000 * seconds / counted:>10.2f}{seconds / steps.total:>8.1%}"
        for part, seconds in timer.seconds.items()
    ]
    lines.append(f"{'whole step':<16}{1000 * steps.total / counted:>10.2f}{1:>8.1%}")
    batch, workers = 1000 * sum(collate) / len(collate), trainer.args.dataloader_num_workers
    lines.append(
        f"Reading and processing a batch takes {batch:.2f} ms, "
        + (f"in {workers} worker(s): one every {batch / workers:.2f} ms." if workers else "within 'data wait'.")
    )
    return "\n".join(lines)
