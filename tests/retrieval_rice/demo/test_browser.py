"""The demo in a real browser: Debian's chromium, driven by playwright."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium, such as Debian's package of that name"),
]

WAIT = 60_000


@pytest.fixture
def page(demo):
    """The demo's page in a browser; requests to anywhere else are noted in `page.outside`."""
    pytest.importorskip("gradio", reason="needs gradio")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    from retrieval_rice.demo.app import serve, upload_folder

    with upload_folder() as folder, sync_api.sync_playwright() as playwright:
        demo.folder = folder
        server = serve(demo, block=False)
        try:
            with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
                page = browser.new_page(viewport={"width": 1280, "height": 1400})
                page.set_default_timeout(WAIT)
                page.outside = []
                page.on("request", lambda request: note(page.outside, request.url))
                page.goto(server.local_url)
                page.wait_for_selector("#examples img")
                yield page
        finally:
            server.close()
    assert not Path(folder).exists()


def note(outside: list, url: str) -> None:
    if not url.startswith(("http://127.0.0.1", "data:", "blob:")):
        outside.append(url)


def first_product(page, words: str) -> None:
    """Waits until the first product of the ranking has these words."""
    page.locator("#ranking .caption-label").first.filter(has_text=words).wait_for()


def test_an_example_is_chosen_and_explained(page):
    page.locator("#examples img").nth(2).click()
    first_product(page, "1. ✓")
    first_product(page, "title 4")
    assert "the right product: rank 1" in page.locator("#answer").inner_text()
    assert page.locator("#frames img").count() == 2 and page.locator("#heat img").count() == 2
    page.locator("#words").filter(has_text="All patches of title 4").wait_for()
    before = [image.get_attribute("src") for image in page.locator("#heat img").all()]
    page.locator("#ranking img").nth(1).click()
    second = page.locator("#ranking .caption-label").nth(1).inner_text().rpartition("title")[2].strip()
    page.locator("#words").filter(has_text=f"All patches of title {second}").wait_for()
    page.locator("#picture img").click(position={"x": 5, "y": 5})
    page.locator("#words").filter(has_text="row 1, column 1").wait_for()
    assert [image.get_attribute("src") for image in page.locator("#heat img").all()] != before
    page.locator("#every").click()
    page.locator("#words").filter(has_text="All patches").wait_for()
    frames = [image.get_attribute("src") for image in page.locator("#frames img").all()]
    page.locator("#boxes").get_by_label("true", exact=True).check()
    # A frame is another picture where its box is drawn; the second has none.
    changed = "src => document.querySelector('#frames img')?.getAttribute('src') !== src"
    page.wait_for_function(changed, arg=frames[0])
    assert page.locator("#frames img").nth(1).get_attribute("src") == frames[1]
    assert page.outside == []


def upload(page, files, name: str) -> None:
    """Chooses files, waits until they have arrived, and asks for recognition."""
    page.locator("#files input[type=file]").set_input_files(files)
    page.locator("#files").get_by_text(name).wait_for()
    page.locator("#recognise").click()


def test_an_upload_is_recognised_and_a_bad_one_refused(page, save_frames, tmp_path):
    page.get_by_role("tab", name="upload").click()
    page.locator("#shop input").click()
    page.get_by_role("option", name="y", exact=True).click()
    upload(page, save_frames(7), "frame1")
    first_product(page, "title 7")
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    assert uploads.is_dir() and not list(uploads.rglob("frame*.png"))
    # The page forgets the files, which are gone.
    page.locator("#files").get_by_text("frame1").wait_for(state="hidden")

    bad = tmp_path / "notes.png"
    bad.write_text("no picture")
    upload(page, str(bad), "notes")
    page.get_by_text("notes.png is neither a picture").wait_for()
    assert not list(uploads.rglob("notes*")) and page.outside == []
