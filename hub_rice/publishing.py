"""A transformers Trainer that publishes weights, processor, code and card of a run, and nothing else."""

import logging
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, create_repo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .checkpoint import weights_fingerprint
from .repository import hub_errors, publication, upload
from .results import read_results
from .training_record import license_of

logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """
    With `push_to_hub`, publishes at every save (`hub_strategy="every_save"`) or at the end (`"end"`). The repository
    is private unless `hub_private_repo` is False. transformers' Trainer would upload the whole output folder,
    including pickled arguments.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository. Raises `ValueError` without a licence, and errors of the Hub as `hub_errors`."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        if self.args.hub_license is None and license_of(self.args.output_dir) is None:
            raise ValueError(
                "push_to_hub needs a licence, and that of the training data is not known: set hub_license."
            )
        with hub_errors(name):
            self.hub_model_id = create_repo(name, token=token, private=private is not False, exist_ok=True).repo_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future | None:
        """
        Saves the model and publishes it, with the results of `output_dir/results.json` if they belong to its weights.

        Args:
            commit_message, revision, token, private: As in `Trainer.push_to_hub`.
            blocking: Whether to wait; otherwise a `Future` of the commit is returned.

        Returns:
            The commit; `None` on all processes but the first.

        Raises:
            PermissionError, FileNotFoundError, ConnectionError: for errors of the Hub, with what to do.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._publish(
            self.args.output_dir, commit_message, token=token, revision=revision, background=not blocking
        )

    def _publish(self, folder: str, message: str | None, **options) -> CommitInfo | Future:
        args = self.args
        results = Path(folder) / "results.json"
        measured = read_results(results) if results.is_file() else None
        if measured is not None and measured.get("model_sha256") != weights_fingerprint(folder):
            measured = None
        options["revision"] = options.get("revision") or args.hub_revision
        picture = Path(folder) / "matches.png"
        files = publication(folder, self.hub_model_id, measured, license=args.hub_license, picture=picture)
        return upload(files, self.hub_model_id, private=args.hub_private_repo is not False, message=message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publishes a checkpoint's model in the background. A failure is logged, and training continues."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        step = self.state.global_step
        try:
            future = self._publish(checkpoint_folder, f"Training in progress, step {step}", background=True)
        except (OSError, ValueError) as error:
            logger.warning("Step %d was not published: %s", step, error)
            return

        def tell(job: Future) -> None:
            if not job.cancelled() and job.exception() is not None:
                logger.warning("Step %d was not published: %s", step, " ".join(str(job.exception()).split()))

        future.add_done_callback(tell)
        self.push_in_progress = PushInProgress([future])
