"""The page's server: on this machine only, with bounds on what it takes, and nothing left when it ends."""

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meta_dataset_readers.endings import held
from meta_dataset_readers.errors import InputError

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
LARGEST_FILE = 20 * 2**20  # bytes of one picture
LARGEST_REQUEST = 200 * 2**20  # bytes of pictures dropped at once
MOST_KEPT = 2**30  # bytes of pictures on disk, of everybody together
MOST_PEOPLE = 32  # whose answers are held; the longest unused go first
KEPT_FOR = 3600  # seconds that pictures of nobody stay

_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SHARE": "False",
}


def free_port(port: int) -> int:
    """A port that nobody listens at: `port`, or for 0 any.

    Raises:
        InputError: it is in use, or not ours to use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError as error:
            raise InputError(
                f"--port {port}: {error.strerror}; expected a free one, or 0 for any that is"
            ) from error
        return probe.getsockname()[1]


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder in which gradio puts all its files, removed at the end, and an environment in which it asks
    nobody on the network."""
    with held():
        folder = Path(tempfile.mkdtemp(prefix="amt-app-"))
    before = {name: os.environ.get(name) for name in (*_QUIET, "GRADIO_TEMP_DIR", "no_proxy")}
    past_proxies = ",".join(filter(None, (before["no_proxy"], HOST)))
    os.environ.update(_QUIET | {"GRADIO_TEMP_DIR": str(folder), "no_proxy": past_proxies})
    try:
        yield folder
    finally:
        with held():
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def serving(blocks: "gradio.Blocks", folder: Path, port: int, **look: Any) -> Iterator[str]:
    """While active the page is served; gives its address.

    Args:
        folder: of `own_folder`.
        port: a free one.
        look: further arguments of gradio's `launch`.

    Raises:
        InputError: somebody else has taken the port meanwhile.
    """
    from starlette.middleware import Middleware

    bounded = Middleware(Bounded, folder=folder)
    try:
        with held():  # a signal within an import would end the program at once, and leave the folder
            blocks.queue(max_size=MOST_PEOPLE, default_concurrency_limit=1).launch(
                server_name=HOST,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                state_session_capacity=MOST_PEOPLE,
                app_kwargs={"middleware": [bounded], "docs_url": None, "redoc_url": None},
                **look,
            )
    except OSError as error:
        raise InputError(f"--port {port}: {error}") from error
    try:
        yield f"http://{HOST}:{port}"
    finally:
        with held():
            blocks.close(verbose=False)


def wait() -> None:
    """Until a signal is raised."""
    threading.Event().wait()


class Bounded:
    """Refuses uploads that are too large together, before they are written (ASGI middleware).

    Args:
        app: what is protected.
        folder: where uploads are.
        largest, most: bytes of one request, and on disk.
    """

    def __init__(self, app: Callable, folder: Path, largest: int = LARGEST_REQUEST, most: int = MOST_KEPT):
        self.app, self.folder, self.largest, self.most = app, folder, largest, most

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        refused = self.refusal(scope)
        if refused is None:
            await self.app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        await JSONResponse({"detail": refused}, status_code=413)(scope, receive, send)

    def refusal(self, scope: dict) -> str | None:
        """Why a request is not taken; None if it is."""
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return "an upload says how long it is"
        if int(length) > self.largest:
            return f"{int(length)} bytes at once, {self.largest} are taken"
        if int(length) + size_of_folder(self.folder) > self.most:
            return f"there is room for {self.most} bytes of pictures, and it is full; try later"
        return None


def size_of_folder(folder: Path) -> int:
    """Bytes of the files in a folder and those below; files that vanish meanwhile count for nothing."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(inner, name)).st_size
    return total
