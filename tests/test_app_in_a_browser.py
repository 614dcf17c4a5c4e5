"""The page for trying a pool as people meet it: pictures dropped in a real Chromium, up to an answer and an
attack; two people at once; and what is left when the program ends.

Skipped where there is no gradio, no browser, or no playwright to drive one. AMT_SCREENSHOTS names a folder
for pictures of the page at both widths.
"""

import base64
import importlib.util
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import test_page_in_a_browser as pages
from commands import start

from amt.app.server import LARGEST_FILE

if importlib.util.find_spec("gradio") is None:  # not imported here: that takes seconds
    pytest.skip("the extra `app` is not installed", allow_module_level=True)
httpx = pytest.importorskip("httpx")  # which gradio brings
browser = pages.browser

DROPPED = """(files) => {
  const held = new DataTransfer();
  for (const [name, text] of files) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    held.items.add(new File([bytes], name, { type: "image/png" }));
  }
  return held;
}"""


class Started(NamedTuple):
    """The program, and the folder that it may write temporary files to."""

    process: subprocess.Popen
    temporary: Path


@pytest.fixture(scope="module")
def started(photos, tmp_path_factory):
    """The program, which is loading: a browser can be started meanwhile."""
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        words = ("-m", "amt", "app", photos / "vit_mini_pool.safetensors", "--port", 0, "--threads", 1)
        found = Started(start(*words, "--device", "cpu", cwd=temporary), temporary)
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.fixture(scope="module")
def address(started):
    """Of the page. At the end the program is told to stop: it says so in one line, and leaves nothing."""
    line = started.process.stdout.readline().decode()
    assert line, started.process.stderr.read().decode()
    yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    assert list(started.temporary.rglob("*.png")), "pictures are somewhere else"
    started.process.send_signal(signal.SIGTERM)
    _, errors = started.process.communicate(timeout=60)
    assert (started.process.returncode, errors.decode()) == (128 + signal.SIGTERM, "interrupted\n")
    assert list(started.temporary.iterdir()) == []


@pytest.fixture
def opened(started, browser, address):
    """`opened(width)` shows the page to somebody new; what it complained of and asked for is checked at the
    end."""
    complaints, requests, contexts = [], [], []

    def show(width: int):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(address)
        return tab

    yield show
    for context in contexts:
        context.close()
    assert not complaints
    assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]


def drop(tab, where: str, files: list[Path]) -> None:
    """Files dropped on a place, which shows them afterwards."""
    held = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    target = tab.locator(f"{where} button").first
    target.dispatch_event("drop", {"dataTransfer": tab.evaluate_handle(DROPPED, held)})
    tab.wait_for_function(f"document.querySelectorAll('{where} img').length == {len(files)}")


def shown(tab) -> list[str]:
    """What is written on the answers, for example `cat 80%`."""
    return [text.strip() for text in tab.locator("#answers .caption-label").all_inner_texts()]


@pytest.mark.parametrize("width", pages.WIDTHS)
def test_a_task_from_drop_to_answer(opened, photos, tmp_path, width):
    tab = opened(width)
    for number, name in enumerate(("cat", "dog")):
        tab.locator(f"#name-{number} input, #name-{number} textarea").first.fill(name)
        drop(tab, f"#class-{number}", sorted((photos / "support" / name).iterdir()))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    drop(tab, "#new", [*sorted((photos / "new").iterdir()), tmp_path / "bad.png"])
    tab.locator("#classify").click()
    tab.locator("#answers img").nth(1).wait_for()
    assert [re.fullmatch(r"(cat|dog) \d+%", text)[1] for text in shown(tab)] == ["cat", "dog"]
    assert "trained at 8/255" in tab.locator("#merged").inner_text()
    assert "Not read: bad.png: the image of 10 bytes" in tab.locator("#notes").inner_text()
    assert not tab.locator("#under-attack").is_visible()
    tab.locator("#answers img").nth(1).click()
    tab.locator("#probabilities h2", has_text="dog").wait_for()
    tab.locator("#epsilon input[type=number]").fill("16")
    tab.locator("#epsilon input[type=number]").press("Enter")
    tab.locator("#attack").click()
    tab.locator("#image-attacked img").wait_for()
    verdict = tab.locator("#verdict").inner_text()
    assert re.search(r"^(Stands at 16/255: still dog|Falls at 16/255: dog becomes cat), \d+%", verdict)
    assert tab.locator("#before h2").inner_text() == "dog"
    assert re.search("perturbation, [89] times", tab.locator("#image-perturbation").inner_text())
    assert tab.evaluate(pages.OVERFLOW) <= 0
    tab.screenshot(
        path=os.environ.get("AMT_SCREENSHOTS", tmp_path) / Path(f"app-{width}.png"), full_page=True
    )


def test_the_example_is_one_click_and_nobody_sees_the_pictures_of_another(opened):
    one, other = opened(1440), opened(1440)
    one.locator("#example").click()
    one.locator("#new img").nth(5).wait_for()
    one.locator("#classify").click()
    one.locator("#answers img").nth(5).wait_for()
    other.locator("#classify").click()
    other.get_by_text("no pictures so far; put pictures into two classes or more").first.wait_for()
    assert other.locator(".gradio-container img").count() == 0
    other.reload()
    other.locator("#classify").wait_for()
    assert not other.locator("#answered").is_visible() and shown(one)


def test_the_server_refuses_what_is_too_large_and_files_of_others(started, address):
    """Whatever a page would allow. What is taken goes into the program's own folder."""

    def post(size: int) -> httpx.Response:
        return httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(size))}, timeout=60)

    assert post(LARGEST_FILE + 1).status_code == 413
    (path,) = post(100).json()
    assert Path(path).is_relative_to(started.temporary)
    assert httpx.get(f"{address}/gradio_api/file={path}").status_code == 200
    assert httpx.get(f"{address}/gradio_api/file=/etc/hosts").status_code == 403
