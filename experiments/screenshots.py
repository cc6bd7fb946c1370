"""Screenshots of pages for the documentation: light, dark and narrow, each under 250 KB.

python experiments/screenshots.py report.html docs/inspect
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

_MOST_BYTES = 250_000
_VIEWS = {
    "light": {"viewport": {"width": 1200, "height": 860}},
    "dark": {"viewport": {"width": 1200, "height": 860}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 420, "height": 860}},
}


def main() -> None:
    """Write PAGES.png, one for every view."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="what `memorizing inspect` or `compare` wrote")
    parser.add_argument("out", type=Path, help="how the pictures' names begin")
    parser.add_argument("--token", type=int, help="that is chosen on the page")
    options = parser.parse_args()
    # Only here: a browser is not needed for anything else.
    from playwright.sync_api import sync_playwright

    target = options.page.resolve().as_uri()
    if options.token is not None:
        target += f"#t{options.token}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=120_000
        )
        for name, view in _VIEWS.items():
            page = browser.new_page(**view)
            page.set_default_timeout(120_000)
            page.goto(target)
            path = options.out.with_name(f"{options.out.name}_{name}.png")
            page.screenshot(path=path)
            size = path.stat().st_size
            print(f"{path}: {size / 1000:.0f} KB")
            if size > _MOST_BYTES:
                raise SystemExit(f"{path} is larger than {_MOST_BYTES / 1000:.0f} KB")
        browser.close()


if __name__ == "__main__":
    main()
