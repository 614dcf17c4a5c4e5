"""Try a pool in the browser: your pictures in, classes out, and what an attack does to them.

    python -m amt app POOL                 then open the address it prints; Ctrl-C ends it
    python -m amt app POOL --port 8000

POOL is the name of a pool in the box, a file, or the folder of a training. The page is served on this
computer only (127.0.0.1). Pictures are kept in a temporary folder, which is removed at the end. It needs
gradio: pip install 'adversarial-meta-tuning[app]'.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amt.app import server
from amt.cli import options
from amt.cli.options import Parser
from amt.cli.predict import add_model, merging
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.settings import Number

if TYPE_CHECKING:
    from amt.app.answers import Source

PORT = 7860  # gradio's own


def parser() -> Parser:
    """The flags of the command."""
    parser = Parser(__doc__.partition("\n")[0], "python -m amt app")
    parser.add_argument("pool", help="a pool in the box, a file, or a folder of one")
    parser.add_argument(
        "--port",
        type=Number(int, least=0, most=65535),
        default=PORT,
        help="where the page is served on this computer; 0: any free port",
    )
    add_model(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install 'adversarial-meta-tuning[app]'")
    port = server.free_port(args.port)
    source = opened(args)
    with server.own_folder() as folder:
        from amt.app import page

        blocks = page.build(source, source.pool.stem)
        with server.serving(blocks, folder, port, **page.look()) as address:
            say(f"the page is at {address}; Ctrl-C ends it, and removes its pictures")
            server.wait()
    return 0


def opened(args: argparse.Namespace) -> "Source":
    """The pool that the flags describe; the example is fitted with it, so that faults are told at once.

    Raises:
        InputError: the pool, what is to be merged of it, or the device is at fault.
    """
    from amt.app import example
    from amt.app.answers import Source
    from amt.few_shot import task_file
    from amt.few_shot.pools import find_pool

    options.use_machine(args)
    file = find_pool(args.pool)
    if task_file.is_task(file):
        raise InputError(f"{file}: is a saved task, which has its classes; expected a pool")
    source = Source(file, merging(args), args.arch, args.image_size, args.device)
    drawn = example.draw().classes
    pairs = [(picture, name) for name, held in drawn.items() for picture in held]
    source.fit(*zip(*pairs, strict=True))
    return source
