"""Updates that are left out because the loss or the gradient is not finite."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .processes import maximum


class UpdateGuard:
    """
    Decides, alike on all processes, whether an update is made, and counts those that are not.

    What a bad batch does to the statistics of batch norms is undone too, or one NaN would stay for ever.

    Args:
        model: That is trained.
        limit: Updates in a row that may be left out, >= 1; 0 never stops.
        last_checkpoint: Names the newest whole checkpoint, or `None`, for the message.

    Attributes:
        skipped, in_a_row: Updates left out so far, and since the last one that was made.
    """

    def __init__(self, model: nn.Module, limit: int, last_checkpoint: Callable[[], str | None]):
        self.model, self.limit, self.last_checkpoint = model, limit, last_checkpoint
        self.skipped = self.in_a_row = 0
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Before the first batch of an update."""
        self._losses = []
        self._statistics = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]

    def see(self, loss: Tensor) -> None:
        """The loss of each batch of the update, on this process."""
        self._losses.append(loss.detach().float())

    def loss(self) -> float:
        """Of the update, on this process."""
        return sum(loss.item() for loss in self._losses)

    def refuses(self, gradient_norm: Tensor | float | None, scaled: bool, step: int) -> bool:
        """
        Whether the update must be left out; to be asked once per update, by all processes.

        Args:
            gradient_norm: Over all processes. `None` is taken for finite.
            scaled: The gradients went through a loss scaler, which leaves out updates of infinite gradients itself, as
                a part of finding its scale; then the loss alone counts.
            step: Updates done so far, for the message.

        Raises:
            FloatingPointError: after `limit` refusals in a row, naming the last checkpoint.
        """
        finite = [torch.isfinite(loss) for loss in self._losses]
        bad = ~torch.stack(finite).all() if finite else torch.tensor(False)
        if gradient_norm is not None and not scaled:
            norm = gradient_norm if isinstance(gradient_norm, Tensor) else torch.tensor(gradient_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            bad = bad.to(norm.device) | ~torch.isfinite(norm)
        # A loss may be bad on one process alone, and all must decide alike.
        if not maximum(bad, bad.device):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        with torch.no_grad():
            for buffer, before in self._statistics:
                buffer.copy_(before)
        if self.limit and self.in_a_row >= self.limit:
            checkpoint = self.last_checkpoint()
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row, up to step {step + 1}, had a loss or gradient that is not finite "
                f"and were left out; the last good checkpoint is {checkpoint or 'none'}: lower learning_rate or look "
                f"at the data, and go on from it in another output_dir with resume_from_checkpoint."
            )
        return True

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
