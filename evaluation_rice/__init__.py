"""Evaluation under one protocol (docs/protocol.md): recall, baselines, reports. Independent of model classes."""

from .recall import recall_at_k

__all__ = ["recall_at_k"]
