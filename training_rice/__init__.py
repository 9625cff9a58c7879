"""Training RICE with transformers' Trainer: arguments, exact gather, trainer."""
