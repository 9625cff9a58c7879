"""Makes docs/demo.png and docs/report.png again, from what `make demo` and `eval_rice.py --report` wrote to runs/demo.

Needs playwright, a chromium and a font with Chinese characters (Debian: chromium, fonts-noto-cjk). Look at the
pictures before committing them: whole texts, the right product first, and the figures of the README.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from retrieval_rice.demo.app import serve, upload_folder
from retrieval_rice.demo.command import load_demo
from rice_cli import build_parser

DOCS = Path(__file__).parent
REPORT = DOCS.parent / "runs" / "demo" / "report.html"
# The first sections, and the first of the best and of the worst clips.
ABRIDGED = "section:nth-of-type(n+4):not(:has(.query)), .query ~ .query { display: none }"


def save(page: Page, name: str) -> None:
    """With 256 colours, which takes a third of the bytes and costs one grey level on average."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=3).save(DOCS / name, optimize=True)
    print(DOCS / name)


def show_demo(page: Page) -> None:
    """The first clip of the first livestream."""
    demo = load_demo(build_parser().parse_args(["demo"]))
    with upload_folder() as folder:
        demo.folder = folder
        server = serve(demo, block=False)
        try:
            page.goto(server.local_url)
            page.locator("#examples img").first.click()
            page.locator("#heat img").last.wait_for()
            # Pictures are still fading in.
            page.wait_for_timeout(3000)
            save(page, "demo.png")
        finally:
            server.close()


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(REPORT.as_uri())
        page.add_style_tag(content=ABRIDGED)
        save(page, "report.png")
        page.set_default_timeout(120_000)
        show_demo(page)
        browser.close()


if __name__ == "__main__":
    main()
