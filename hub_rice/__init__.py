"""
Reading checkpoints, writing cards, publishing on the Hub, and export.

Reading: `loading` (model and processor from a folder or the id of a published model), `checkpoint` (whether a folder
is a complete checkpoint, and its weight files), `settings` (checks of untrusted JSON), `training_record` and `results`
(the records of a training run and of an evaluation).

Writing: `model_card`, `dataset_card` and `tables` (generated pages), `privacy` (removes local paths from texts),
`repository` (which files of a folder are published, and errors of the Hub in one sentence), `publishing` (a Trainer
that publishes only these files), `files` (the file of --output).

Commands: `encoders`, `untrained`, `convert`, `publish`, `publish_dataset`, `mteb_wrapper`, and `export` (ONNX graphs,
and the model that runs them). Each has `add_arguments` and `run`; slow imports are inside these functions.
"""
