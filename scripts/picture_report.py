"""Take the screenshot in docs/patterns.md: python scripts/picture_report.py REPORT.html docs/images/report.png.

Requires the extra `browser` and Chromium, which `make test-report` installs.
"""

from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import sync_playwright

from blade.cli.command import run_script
from blade.common.files import check_writable, write_files

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
"""The sandbox does not start for root."""


def main(
    report: Annotated[Path, typer.Argument(help="Report of `blade-profile`.")],
    output: Annotated[Path, typer.Argument(help="The PNG.")],
    step: Annotated[int, typer.Option(help="Step shown in the map of heads.")] = 12,
    layer: Annotated[int, typer.Option(help="Layer of the selected head.")] = 3,
    head: Annotated[int, typer.Option(help="The selected head.")] = 0,
    chromium: Annotated[Path, typer.Option(help="The browser.")] = Path("/usr/bin/chromium"),
) -> None:
    """Write a screenshot of the map of heads and the selected head next to it."""
    check_writable(output)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.25)
        page.goto(report.resolve().as_uri())
        for name, value in (("step", step), ("layer", layer), ("head", head)):
            page.locator(f"#{name}").fill(str(value))
            page.locator(f"#{name}").dispatch_event("change")
        picture = page.locator("section[aria-labelledby=heads-title]").screenshot()
        browser.close()
    write_files({output: picture})


if __name__ == "__main__":
    run_script(main)
