"""Sequence features: the events that a user's sequence is made of."""

from seqkernels.features.event_batch import EventBatch, EventTensors
from seqkernels.features.event_sequences import EventSequences

__all__ = ["EventBatch", "EventSequences", "EventTensors"]
