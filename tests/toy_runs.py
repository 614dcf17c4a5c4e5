"""Run directories as test_meta_dataset.py leaves them, with made-up numbers: what tests of the report read.

The numbers follow a rule simple enough to be judged by eye: accuracy falls with epsilon, faster without
robust adapters, and differs by domain.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import columns

ATTACKS = (Attack("pgd", (2, 4, 8)), Attack("square", (4, 8), queries=500), Attack("pgd", (64, 128), "l2"))
DOMAINS = ("mini_signs", "mini_textures", "digits")
ADAPTERS = (8, 6, 0.1, 0.01)


def write_run(
    folder: Path,
    *,
    domains: Sequence[str] = DOMAINS,
    attacks: Sequence[Attack] = ATTACKS,
    episodes: int = 20,
    strength: float = 0.6,
    seed: int = 0,
    finished: bool = True,
    adapters: Sequence[float] = ADAPTERS,
    samples: int = 3,
    classes: Sequence[str] = ("stop", "yield", "no entry", "turn right", "roundabout"),
    suspect: Sequence[str] = (),
    stamp: str | None = None,
    averages: Mapping[str, Sequence[str]] | None = None,
    side: int = 32,
    answers: bool = True,
    **about,
) -> Path:
    """Write a run of 5-way 5-shot episodes and return its folder.

    Args:
        strength: in [0, 1], how robust the model of these numbers is.
        seed: of the run; runs of one seed share their episodes.
        finished: whether there is a results.json.
        adapters: what they were trained for; none leaves the coefficients empty.
        samples: images of each sample episode, of which every domain has one; 0: no samples.
        suspect: domains whose first episode was probed with a result that nobody believes.
        answers: whether rows have the answers to every image; older runs have none.
        about: replaces fields of run.json.
    """
    folder.mkdir(parents=True)
    described = {
        "format": 1,
        "command": f"test_meta_dataset.py --resume runs/mini/best.safetensors --output_dir {folder.name}",
        "commit": "0f3bad0c1d2e",
        "versions": {"python": "3.11.9", "torch": "2.15.0", "timm": "1.0.20", "numpy": "2.4.6"},
        "started": "2026-05-04T10:00:00+00:00",
        "arch": "vit_mini",
        "checkpoint": "best.safetensors" if adapters else None,
        "seed": seed,
        "split": "TEST",
        "sampling": {"ways": 5, "support": 5, "query": 10},
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "columns": columns(attacks),
        "sources": list(domains),
        "episodes": episodes,
        "averages": averages if averages is not None else {"average": list(domains)},
        "deployments": {domain: {"routing": "amt"} for domain in domains},
        "settings": {"routing": "amt", "top_k": 2, "lr": 5e-4, "trim": []},
    } | about
    write_json(folder / "run.json", described)
    merging = {domain: how_merged(adapters, stamp) for domain in domains}
    write_json(folder / "merging.json", merging)
    rows = [
        row(domain, place, index, attacks, strength, seed, len(adapters), classes if answers else ())
        | (failed_probe(attacks) if domain in suspect and index == 0 else {})
        for place, domain in enumerate(domains)
        for index in range(episodes)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    if samples:
        (folder / "samples").mkdir()
        for place, domain in enumerate(domains):
            write_sample(folder / "samples" / f"{domain}-0.npz", place, samples, classes, side)
    if finished:
        described |= {
            "summary": {},
            "suspect": [],
            "episode_seconds": 83.2 + 10 * strength,
            "peak_memory_mb": 731.4,
            "device": "cpu",
            "skipped_records": 0,
            "merging": merging,
        }
        write_json(folder / "results.json", described)
    return folder


def row(
    domain: str,
    place: int,
    index: int,
    attacks: Sequence[Attack],
    strength: float,
    seed: int,
    adapters: int,
    classes: Sequence[str] = (),
) -> dict:
    """An episode: runs of one seed share its difficulty, and so differ less than their intervals say."""
    luck = np.random.default_rng([seed, place, index]).normal(0, 0.06)
    own = np.random.default_rng([seed, place, index, int(1000 * strength)])
    easy = 0.82 - 0.11 * (place % 4) - 0.03 * (place // 4) - 0.05 * strength
    accuracy = {}
    for column in columns(attacks):
        attack, _, epsilon = column.partition("@")
        distance = float(epsilon or 9 * (column != "clean")) / (16 if attack.endswith("l2") else 1)
        harm = {"square500": 0.5, "union": 1.15}.get(attack.removesuffix("-l2"), 1)
        value = (
            easy * np.exp(-harm * distance * (1 - 0.85 * strength) / (5 + place % 3))
            + luck
            + own.normal(0, 0.02)
        )
        accuracy[column] = round(float(np.clip(value, 0, 1)) * 50) / 50
    variants = {"variants": {"square500@8": "square, 500 queries"}} if index == 0 else {}
    shares = own.dirichlet([8 * strength, 3, 1 + place, 0.3][:adapters]).tolist() if adapters else []
    seconds = round(float(own.gamma(20, 0.02)) * (1 + place / 2), 4)
    return {
        "source": domain,
        "index": index,
        "ways": 5,
        "support": 25,
        "queries": 50,
        **accuracy,
        "coefficients": shares,
        "fit_seconds": round(seconds / 10, 4),
        "seconds": seconds,
        **variants,
        **({"answers": answers(domain, index, accuracy, classes)} if classes else {}),
    }


def answers(domain: str, index: int, accuracy: Mapping[str, float], classes: Sequence[str]) -> dict:
    """Ten images of each of five classes, as many right as the accuracies say; what is wrong is mostly taken
    for the next class."""
    labels = [k // 10 for k in range(50)]
    order = np.random.default_rng([index, len(domain)]).permutation(50).tolist()
    predicted = {}
    for column, share in accuracy.items():
        wrong = set(order[round(50 * share) :])
        predicted[column] = [(label + (k in wrong) * (1 + k % 3 // 2)) % 5 for k, label in enumerate(labels)]
    return {
        "classes": list(classes),
        "labels": labels,
        "predicted": predicted,
        "probability": {column: [0.5] * 50 for column in accuracy},
        "files": [f"{domain}/{classes[label]}/{k}.png" for k, label in enumerate(labels)],
        "records": [0] * 50,
    }


def failed_probe(attacks: Sequence[Attack]) -> dict:
    """Counts that make the first attack suspect: images broken at a small radius withstand a larger one."""
    return {
        "checks": {"images": 10, "changed": 0, "zero_gradients": 0, "from_scratch": {attacks[0].name: [7, 9]}}
    }


def how_merged(adapters: Sequence[float], stamp: str | None) -> dict:
    if not adapters:
        return {"how": "none, the pretrained network"}
    how = "amt, beta 1 and gamma 0.6 as given"
    return {"how": how, "epsilons": list(adapters)} | ({"stamp": stamp} if stamp else {})


def write_sample(path: Path, place: int, images: int, classes: Sequence[str], side: int) -> None:
    """Discs on a background, and a perturbation of at most 8/255."""
    rng = np.random.default_rng([place, images])
    y, x = np.mgrid[:side, :side] / side - 0.5
    clean = np.empty((images, side, side, 3), np.uint8)
    for image in clean:
        ground, disc = rng.integers(40, 216, (2, 3))
        inside = (x - rng.uniform(-0.15, 0.15)) ** 2 + (y - rng.uniform(-0.15, 0.15)) ** 2 < 0.09
        image[:] = np.where(inside[..., None], disc, ground)
    perturbation = (8 * np.sign(rng.normal(size=clean.shape))).astype(np.float16)
    labels = np.arange(images, dtype=np.int64) % len(classes)
    np.savez(
        path,
        source=np.array(path.stem.rpartition("-")[0]),
        index=np.array(0),
        clean=clean,
        attacked=np.clip(clean + perturbation, 0, 255).astype(np.uint8),
        perturbation=perturbation,
        labels=labels,
        predicted_clean=labels,
        predicted_attacked=(labels + (np.arange(images) % 2)) % len(classes),
        class_names=np.array(classes),
        column=np.array("pgd20@8"),
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
