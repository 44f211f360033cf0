"""What features are worth for a task."""

from vitprobe.evaluation.knn import knn_accuracy

__all__ = ["knn_accuracy"]
