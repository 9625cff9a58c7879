"""
Everything between a folder and the Hub.

Reading: `loading` (a checkpoint, or the id of a published model, as model and processor), `checkpoint` (is it whole,
which weights are its own), `settings` (JSON that a stranger wrote), `training_record` and `results` (what a run and
an evaluation left behind).

Writing: `model_card`, `dataset_card` and `tables` (pages that nobody types), `privacy` (texts without paths of this
machine), `repository` (what of a folder is published, and the Hub's answers in one sentence), `publishing` (a Trainer
that publishes that and nothing else), `files` (the file of --output).

Commands: `convert`, `publish`, `publish_dataset`, `mteb_wrapper`, and `export` (ONNX graphs, and the model that runs
them). Each has `add_arguments` and `run`, and imports what is slow to load inside them.
"""
