"""Mini-Meta-Dataset on disk: records, specifications and the manifest that says what is complete.

Knows directories, processes and JPEG. Does not know what the pictures show.

A source is written into a hidden directory beside its place, its dataset_spec.json last, and renamed when it
is whole; then it is entered in `mini.json`. So whatever is killed when, a directory named like a source is
complete, and one that is not in `mini.json` is made again. (A killed run leaves its `.partial-*` directory
behind, which can be deleted; later runs do not touch it, since another run may be using it.)
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from meta_dataset_readers.errors import InputError, blaming, strerror
from meta_dataset_readers.files import read_json
from meta_dataset_readers.mini.sources import OBJECTS, OBJECTS_PER_CLASS, SOURCE_NAMES, Source, build
from meta_dataset_readers.processes import mapped, processes
from meta_dataset_readers.spec import FILE_PATTERN, SPEC_FILE
from meta_dataset_readers.tfrecord import encode_example, write_records

GENERATOR_VERSION = 1  # raised whenever the same settings give other pictures
MANIFEST = "mini.json"
PARTIAL = ".partial-"
JPEG_QUALITY = 85


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides every byte of the data set."""

    seed: int = 0
    objects_per_class: int = OBJECTS_PER_CLASS

    def of(self, source: str) -> dict:
        """The settings that matter to one source, as they stand in the manifest."""
        own = {"generator_version": GENERATOR_VERSION, "seed": self.seed}
        return own | ({"objects_per_class": self.objects_per_class} if source == OBJECTS else {})


@dataclasses.dataclass(frozen=True)
class Written:
    """One source as it lies on disk."""

    name: str
    classes: int
    images: int
    bytes: int
    fresh: bool  # made by this call, rather than found complete


def make_mini(
    out: str | os.PathLike,
    *,
    settings: Settings = Settings(),
    sources: Iterable[str] = SOURCE_NAMES,
    workers: int = 1,
    force: bool = False,
    progress: bool = False,
) -> list[Written]:
    """Make the named sources of Mini-Meta-Dataset under the directory `out`, or find them complete there.

    The bytes depend on `settings` (and the versions of Pillow and numpy) only, not on `workers`, the number
    of processes. A source made with other settings is replaced. With `force`, `out` may be a directory that
    holds other things; they stay, except directories named like a source.
    Raises InputError for unknown sources, settings out of range or an `out` that is not ours.
    """
    out = Path(out)
    if settings.seed < 0:
        raise InputError(f"--seed: {settings.seed}: expected 0 or more")
    if settings.objects_per_class < 1:
        raise InputError(f"--objects_per_class: {settings.objects_per_class}: expected 1 or more")
    if workers < 1:
        raise InputError(f"--workers: {workers}: expected 1 or more")
    wanted = {name: build(name, settings.objects_per_class) for name in dict.fromkeys(sources)}
    manifest = _claim(out, force)
    missing = [name for name in wanted if not _is_complete(out, name, settings, manifest)]
    images = sum(sum(wanted[name].counts) for name in missing)
    if missing:
        with (
            processes(workers) as pool,
            tqdm(total=images, unit="image", disable=not progress, leave=False) as bar,
        ):
            for name in missing:
                bar.set_description(name)
                manifest.pop(name, None)
                _save_manifest(out, manifest)
                manifest[name] = _write_source(out, wanted[name], settings, pool, bar)
                _save_manifest(out, manifest)
    kept = ("classes", "images", "bytes")
    return [Written(name, *(manifest[name][key] for key in kept), name in missing) for name in wanted]


def _claim(out: Path, force: bool) -> dict[str, dict]:
    """Make `out` a directory of ours and return the manifest's entries by source."""
    path = out / MANIFEST
    with blaming(f"--out: {out}: cannot be used as a directory", OSError, strerror):
        if path.exists():
            return _load_manifest(path)
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(PARTIAL))
        if foreign and not force:
            raise InputError(
                f"--out: {out}: holds {foreign[0]!r} but no {MANIFEST}, so it is not a Mini-Meta-Dataset; "
                "choose a new or empty directory, or add --force to write beside what is there"
            )
        _save_manifest(out, {})
    return {}


def _load_manifest(path: Path) -> dict[str, dict]:
    try:
        sources = read_json(path)["sources"]
        return {str(name): dict(entry) for name, entry in sources.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest of Mini-Meta-Dataset; delete it to start anew") from error


def _save_manifest(out: Path, sources: dict[str, dict]) -> None:
    text = json.dumps(
        {"about": "Mini-Meta-Dataset: python -m meta_dataset_readers.mini", "sources": sources}, indent=2
    )
    unfinished = out / f"{PARTIAL}{os.getpid()}-{MANIFEST}"
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, out / MANIFEST)


def _is_complete(out: Path, name: str, settings: Settings, manifest: dict[str, dict]) -> bool:
    """Whether the source was made with these settings and its files have kept their number and size."""
    entry, directory = manifest.get(name), out / name
    if entry is None or entry.get("settings") != settings.of(name) or not (directory / SPEC_FILE).is_file():
        return False
    sizes = [file.stat().st_size for file in directory.glob(FILE_PATTERN.format("*"))]
    return (len(sizes), sum(sizes)) == (entry.get("classes"), entry.get("bytes"))


def _write_source(out: Path, source: Source, settings: Settings, pool: Executor | None, bar: tqdm) -> dict:
    """Write one source, put it in its place and return its entry for the manifest."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=out) as scratch:
        fresh = Path(scratch) / source.name
        fresh.mkdir()
        write = functools.partial(_write_class, source.name, settings, fresh)
        digest, size = hashlib.sha256(), 0
        died = "a process died, perhaps for want of memory; --workers 1 needs the least"
        written = mapped(pool, write, range(len(source.classes)), died)
        for class_id, (class_digest, class_size) in enumerate(written):
            digest.update(class_digest)
            size += class_size
            bar.update(source.counts[class_id])
        spec = json.dumps(source.spec(), indent=2)
        digest.update(spec.encode())
        (fresh / SPEC_FILE).write_text(spec, encoding="utf-8")
        _replace_directory(fresh, out / source.name, Path(scratch) / "replaced")
    return {
        "settings": settings.of(source.name),
        "classes": len(source.classes),
        "images": sum(source.counts),
        "bytes": size,
        "sha256": digest.hexdigest(),  # of the digests of 0.tfrecords, 1.tfrecords, ..., then of the spec
    }


def _write_class(name: str, settings: Settings, directory: Path, class_id: int) -> tuple[bytes, int]:
    """Write the record file of one class; its SHA-256 and size. Runs in any process."""
    source = _build_once(name, settings.objects_per_class)
    images = source.images(class_id, settings.seed)
    path = directory / FILE_PATTERN.format(class_id)
    write_records(path, (encode_example(_jpeg(image), class_id) for image in images))
    content = path.read_bytes()
    return hashlib.sha256(content).digest(), len(content)


_build_once = functools.cache(build)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _replace_directory(fresh: Path, place: Path, aside: Path) -> None:
    """Put `fresh` at `place`; what was there goes `aside`, to be deleted with the scratch directory."""
    if place.is_symlink() or place.is_file():
        raise InputError(f"{place}: is in the way: expected a directory or nothing")
    if place.exists():
        os.rename(place, aside)
    os.rename(fresh, place)
