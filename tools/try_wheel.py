"""Try what users install: build the wheel, install it into a new environment, use it outside the checkout.

    python -m tools.try_wheel [--python PYTHON] [--keep FOLDER]

PYTHON is the interpreter of the new environment, best of another version than this one. All packages are
installed from the index, so this needs a network, minutes and several GB; tests/test_wheel.py looks at the
wheel without any. FOLDER (default: a temporary one) holds the environment; if it is there it is used again.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = """
mini --out data --sources mini_objects mini_signs --objects_per_class 4 --workers 1
check data
train --arch vit_mini_amt --data_path data --base_sources mini_objects --output_dir train --num_ways 5
 --num_support 1 --num_query 1 --epochs 1 --nEpisode 1 --nValEpisode 1 --attack_iters 1 --warmup_epochs 0
 --threads 1 --num_workers 0 --epsilon 8 0.1
test --arch vit_mini_amt_merge --resume train/last.safetensors --data_path data --test_sources mini_signs
 --num_ways 5 --num_support 1 --num_query 1 --nTestEpisode 2 --epsilon 2 --attack_iters 1 --threads 1
 --num_workers 0 --probe_episodes 1 --output_dir results
report results --out report.html
checkpoint train/last.safetensors
export train/last.safetensors --to timm --coefficients 0.5 0.5 --out net.safetensors
recipe
"""
# Where the command is part of the wheel.
PREDICT = "predict train/last.safetensors --support photos photos/apple --epsilon 2 --out answers.csv"
WRITTEN = ("train/best.safetensors", "results/rows.jsonl", "report.html", "net.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter of the new environment")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the environment is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = environment(args.python, args.keep or Path(temporary) / "environment")
        wheel = build(Path(temporary))
        run(*installer(python), wheel)
        work = Path(temporary) / "elsewhere"
        work.mkdir()
        write_pictures(work / "photos")
        lines = COMMANDS.strip().replace("\n ", " ").splitlines()
        if (ROOT / "amt" / "cli" / "predict.py").is_file():
            lines.append(PREDICT)
        for line in lines:
            run(python.with_name("amt"), *line.split(), cwd=work)
        for name in WRITTEN:
            assert (work / name).is_file(), f"{name} was not written"
        dry = run(
            python.with_name("amt"),
            "recipe",
            "meta_dataset_5w5s",
            "data",
            "out",
            "--dry_run",
            cwd=work,
            code=2,
        )
        assert "missing: " in dry and "-m amt train" in dry
    print("the wheel works")
    return 0


def write_pictures(folder: Path) -> None:
    """Two classes of two pictures of one colour each."""
    for name, colour in (("apple", "red"), ("pear", "green")):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40 + number, 40), colour).save(folder / name / f"{number}.png")


def environment(interpreter: str, folder: Path) -> Path:
    """The interpreter of an environment, made if it is not there."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", interpreter, folder)
    return python


def installer(python: Path) -> list:
    return [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--reinstall-package",
            "adversarial-meta-tuning", "--python", python]  # fmt: skip


def build(folder: Path) -> Path:
    run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def run(*words: object, cwd: Path | None = None, code: int = 0) -> str:
    """Run a command and show it; what it printed.

    Raises:
        SystemExit: it ended with another exit code.
    """
    print("+", *words, flush=True)
    environment = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}
    ended = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != code:
        sys.exit(f"{ended.stdout}\nexit code {ended.returncode}, expected {code}")
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())
