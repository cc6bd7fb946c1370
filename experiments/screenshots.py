"""Screenshots of pages for the documentation: light, dark and narrow, each under 250 KB.

    python experiments/screenshots.py report.html docs/inspect --token 1640
    python experiments/screenshots.py http://127.0.0.1:8000 docs/serve --ask "def rotate_half(x):"

The first is of a page that `memorizing inspect` or `compare` wrote; the second of a running
`memorizing serve`, which is asked to go on from a text, and whose answer is waited for.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

_MOST_BYTES = 250_000
_VIEWS = {
    "light": {"viewport": {"width": 1200, "height": 860}},
    "dark": {"viewport": {"width": 1200, "height": 860}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 420, "height": 860}},
}


def main() -> None:
    """Write PAGES.png, one for every view."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", help="a file that was written, or the address of a server")
    parser.add_argument("out", type=Path, help="how the pictures' names begin")
    parser.add_argument("--token", type=int, help="that is chosen on the page")
    parser.add_argument("--ask", help="what the server goes on from")
    parser.add_argument("--tokens", type=int, default=64, help="that the server writes")
    parser.add_argument("--views", nargs="+", choices=_VIEWS, default=list(_VIEWS))
    options = parser.parse_args()
    # Only here: a browser is not needed for anything else.
    from playwright.sync_api import sync_playwright

    target = options.page
    if "://" not in target:
        target = Path(target).resolve().as_uri()
    if options.token is not None:
        target += f"#token-{options.token}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=120_000
        )
        for name in options.views:
            page = browser.new_page(**_VIEWS[name])
            page.set_default_timeout(120_000)
            page.goto(target)
            if options.ask is not None:
                _ask(page, options.ask, options.tokens)
            path = options.out.with_name(f"{options.out.name}_{name}.png")
            page.screenshot(path=path)
            size = path.stat().st_size
            print(f"{path}: {size / 1000:.0f} KB")
            if size > _MOST_BYTES:
                raise SystemExit(f"{path} is larger than {_MOST_BYTES / 1000:.0f} KB")
        browser.close()


def _ask(page: Any, prompt: str, num_tokens: int) -> None:
    page.locator("#model option").first.wait_for(state="attached")
    page.get_by_label("As").select_option("text")
    page.get_by_label("Tokens").fill(f"{num_tokens}")
    page.get_by_label("Question, or a text").fill(prompt)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("tokens read").wait_for()


if __name__ == "__main__":
    main()
