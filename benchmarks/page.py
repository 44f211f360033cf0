"""How long a report takes to open in Chromium, and what it weighs.

    pip install 'vitprobe[test]'  # and Debian's chromium
    python benchmarks/page.py report/report.html

Times are the browser's own, from navigation on: first contentful paint, the document parsed, and
the page loaded.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import sync_playwright

NAMES = "first paint", "parsed", "loaded"
TIMES = """() => {
  const page = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return [paint ? paint.startTime : NaN, page.domInteractive, page.loadEventEnd];
}"""


@dataclass
class Settings:
    report: tyro.conf.Positional[Path]
    turns: int = 5
    width: int = 1200
    height: int = 900


def main(settings: Settings) -> None:
    path = settings.report.resolve()
    if not path.is_file():
        sys.exit(f"no report at '{settings.report}'")
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for _ in range(settings.turns):
            page = browser.new_page(viewport={"width": settings.width, "height": settings.height})
            page.goto(path.as_uri(), wait_until="load")
            # The paint may come behind the load.
            page.wait_for_timeout(1000)
            found.append(page.evaluate(TIMES))
            page.close()
        browser.close()
    print(f"{path.stat().st_size / 1e6:.2f} MB; least and most of {settings.turns} turns, s:")
    for name, times in zip(NAMES, zip(*found, strict=True), strict=True):
        print(f"{name}: {min(times) / 1e3:.2f} to {max(times) / 1e3:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
