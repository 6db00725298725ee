"""Callbacks that the configuration can name."""

from hift_lightning.callbacks.changes import ChangedParameters
from hift_lightning.callbacks.monitor import HiFTMonitor

__all__ = ["ChangedParameters", "HiFTMonitor"]
