"""Skips updates whose loss or gradient is not finite."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .processes import maximum


class UpdateGuard:
    """
    Decides whether an update is made, equally on all processes, and counts the skipped updates.

    It also restores the batch norm statistics after a bad batch, because a NaN there would be permanent.

    Args:
        model: The trained model.
        limit: Maximum number of skipped updates in a row, >= 1; 0 means no limit.
        last_checkpoint: Returns the newest intact checkpoint or `None`, for the message.

    Attributes:
        skipped, in_a_row: Number of skipped updates in total, and since the last update.
    """

    def __init__(self, model: nn.Module, limit: int, last_checkpoint: Callable[[], str | None]):
        self.model, self.limit, self.last_checkpoint = model, limit, last_checkpoint
        self.skipped = self.in_a_row = 0
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Starts an update; call it before its first batch."""
        self._losses = []
        self._statistics = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]

    def see(self, loss: Tensor) -> None:
        """Records the loss of a batch of the update, on this process."""
        self._losses.append(loss.detach().float())

    def loss(self) -> float:
        """Returns the loss of the update, on this process."""
        return sum(loss.item() for loss in self._losses)

    def refuses(self, gradient_norm: Tensor | float | None, scaled: bool, step: int) -> bool:
        """
        Whether the update must be skipped. All processes must call it once per update.

        Args:
            gradient_norm: Norm over all processes; `None` counts as finite.
            scaled: A loss scaler is active. It skips updates with infinite gradients itself while it adjusts its
                scale, so only the loss is checked.
            step: Number of updates so far, for the message.

        Raises:
            FloatingPointError: after `limit` skipped updates in a row; the message names the last checkpoint.
        """
        finite = [torch.isfinite(loss) for loss in self._losses]
        bad = ~torch.stack(finite).all() if finite else torch.tensor(False)
        if gradient_norm is not None and not scaled:
            norm = gradient_norm if isinstance(gradient_norm, Tensor) else torch.tensor(gradient_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            bad = bad.to(norm.device) | ~torch.isfinite(norm)
        # A loss may be bad on one process only, but all processes must decide equally.
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
                f"and were skipped; the last good checkpoint is {checkpoint or 'none'}: lower learning_rate or check "
                f"the data, and continue from it in another output_dir with resume_from_checkpoint."
            )
        return True

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
