"""Build learn2learn 0.2.0 from its Cython sources and install it into this Python's environment.

    make learn2learn                               (python -m tools.install_learn2learn)

Its release ships C files that no Python from 3.11 on compiles, translated long ago from Cython sources that
are still good: here those are translated afresh. Of what it requires only what `import learn2learn` needs is
installed (not gsutil and qpth), so nothing that is already there changes. Needs a C compiler, Python's header
files and a package index; takes some 40 seconds of processor time.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from meta_dataset_readers.errors import InputError, exit_on_bad_input

NAME = "learn2learn-0.2.0"
RELEASE = "learn2learn==0.2.0 --hash=sha256:69f1d7cb0d0a6be7a2c6ad8e83e2ebbe70fb05e51d61e45e63078b40c75ea419"
NEEDED = ("gym>=0.26", "requests>=2.31", "tqdm>=4.66", "scipy>=1.14.1", "pillow>=10.4")

# The release has no such file. Cython before 3 is what it was written for; what that translates does not
# compile on Python 3.13, and there Cython 3 does it as well.
PYPROJECT = """\
[build-system]
requires = [
    "setuptools>=64",
    "cython>=0.29.37,<3; python_version < '3.13'",
    "cython>=3.0.11; python_version >= '3.13'",
]
build-backend = "setuptools.build_meta"
"""


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if complaint() is None:
        print("learn2learn is installed already")
        return 0
    print("building learn2learn 0.2.0: less than a minute on an idle machine", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        build_and_install(Path(folder))
    if reason := complaint():
        raise InputError(f"learn2learn was built, but cannot be imported: {reason}")
    print("learn2learn 0.2.0 is installed")
    return 0


def complaint() -> str | None:
    """Why learn2learn cannot be imported, in one line; None if it can."""
    tried = subprocess.run([sys.executable, "-c", "import learn2learn"], capture_output=True, text=True)
    return None if tried.returncode == 0 else (tried.stderr.strip() or "no message").splitlines()[-1]


def build_and_install(folder: Path) -> None:
    """Fetch, translate, build and install, with `folder` for everything in between.

    Raises:
        InputError: one of the steps failed; the messages of what failed are on stderr.
    """
    pip = find_pip(folder / "pip")
    pip("install", *NEEDED)
    requirement = folder / "release.txt"
    requirement.write_text(RELEASE)
    source = ("--no-deps", "--no-binary", "learn2learn", "--require-hashes", "-r", requirement)
    pip("download", *source, "--dest", folder)
    unpack(folder / f"{NAME}.tar.gz", folder)
    (folder / NAME / "pyproject.toml").write_text(PYPROJECT)
    # Its setup.py turns to the Cython sources only if the word build_ext is among its arguments.
    pip("install", "--no-deps", "--config-settings=--global-option=build_ext", folder / NAME)


def unpack(archive: Path, folder: Path) -> None:
    """The package and its setup.py; not the C files, so that they are made again, nor the tests, which it
    would install as a package of that name."""
    unwanted = {".eggs", "tests"}
    with tarfile.open(archive) as release:
        release.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        for member in release:
            path = PurePosixPath(member.name)
            if path.suffix != ".c" and unwanted.isdisjoint(path.parts):
                release.extract(member, folder)


def find_pip(spare: Path):
    """This environment's pip, as a function of its arguments; if it has none, uv puts one into `spare`."""
    environment = dict(os.environ)
    if importlib.util.find_spec("pip") is None:
        if uv := shutil.which("uv"):
            run([uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", spare, "pip>=24"])
            environment["PYTHONPATH"] = str(spare)
        else:
            run([sys.executable, "-m", "ensurepip"])

    def pip(command: str, *arguments: str | Path) -> None:
        run([sys.executable, "-m", "pip", command, "--quiet", *arguments], environment)

    return pip


def run(command: list[str | Path], environment: dict[str, str] | None = None) -> None:
    if subprocess.run(command, env=environment).returncode != 0:
        wanted = "a C compiler, Python's header files and a package index are needed"
        raise InputError(f"learn2learn could not be installed, see above; {wanted}")


if __name__ == "__main__":
    exit_on_bad_input(main)
