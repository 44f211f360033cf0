"""Hooks that hand on features and attention while a model runs."""

from vitprobe.capture.listening import Heard, listen
from vitprobe.capture.recorder import Recorder

__all__ = ["Heard", "Recorder", "listen"]
