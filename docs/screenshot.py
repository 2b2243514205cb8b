"""Take the README's picture of a report: ``python docs/screenshot.py demo/report.html docs/images/report.png``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(page: str, picture: str) -> None:
    """Photograph the first screen, 1280 by 800, light, at twice the resolution."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        size = {"width": 1280, "height": 800}
        tab = browser.new_page(viewport=size, device_scale_factor=1.5, color_scheme="light")  # pyright: ignore
        tab.goto(Path(page).resolve().as_uri())
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
