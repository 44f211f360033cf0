"""One offline HTML page that says what a comparison shows, with its figures and tables."""

from vitprobe.report.folder import report

__all__ = ["report"]
