"""One offline HTML page that says what a comparison shows, with its figures and tables."""

from vitprobe.report.folder import check_folder, report

__all__ = ["check_folder", "report"]
