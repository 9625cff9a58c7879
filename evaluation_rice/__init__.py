"""Evaluation under one protocol: recall, baselines, reports. Knows no model class; see docs/protocol.md."""

from .recall import recall_at_k

__all__ = ["recall_at_k"]
