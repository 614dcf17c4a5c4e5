"""Meta-testing: merge the pool anew for every task, and measure it per domain, clean and under attack.

    python test_meta_dataset.py --arch vit_mini_amt_merge --resume runs/x/best.safetensors \\
        --data_path data/mini --test_sources mini_signs digits --output_dir results/x --epsilon 4 8

For each episode the support set decides the coefficients (amt/merge.py), the adapters are merged into one
network, singular values are trimmed if asked for, and prototypes classify the query images; then the same
network is attacked. Nothing is chosen on the episodes that are scored.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial

from tqdm import tqdm

from amt import checkpoint, options, report
from amt.backbone import Backbone, find_device, load_backbone
from amt.evaluate import (
    Predictor,
    Summary,
    average_summary,
    evaluate,
    merged_predictor,
    pretrained_predictor,
    summarise,
)
from amt.lora import LoRAPool
from amt.merge import Coefficients, average_of, route, uniform
from amt.select import select
from meta_dataset_readers.errors import InputError, exit_on_bad_input
from meta_dataset_readers.reader import EpisodeReader, episode_loader
from meta_dataset_readers.stored_episodes import dump_episode


def main() -> int:
    args = options.testing_parser().parse(sys.argv[1:])
    options.check_testing(args)
    options.check_output(args.output_dir)
    options.use_threads(args)
    backbone = load_backbone(
        args.arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        options.autocast(args),
        args.image_size,
        pretrained=args.resume is None and not args.no_pretrain,
    )
    open_source = partial(EpisodeReader, **options.reading(args, backbone.image_size))
    readers = [
        open_source(source=source, split=args.split, n_episodes=args.nTestEpisode)
        for source in options.test_sources(args)
    ]
    attacks = options.attacks(args)
    predict, merging = predictor(args, backbone, open_source)

    rows, skipped = {}, 0
    with tqdm(total=len(readers) * args.nTestEpisode, unit="episode") as progress:
        for each in readers:
            progress.set_description(each.source)
            rows[each.source] = []
            for episode in episode_loader(each, args.num_workers):
                skipped += len(episode.skipped)
                if args.dump is not None:
                    dump_episode(args.dump / each.source, episode.index, episode, each)
                rows[each.source] += evaluate(predict, [episode.to(backbone.device)], attacks, args.seed)
                progress.update()

    columns = ["clean", *(attack.name for attack in attacks)]
    lines = [(source, [summarise(found, column) for column in columns]) for source, found in rows.items()]
    averages = [average_summary(summaries) for summaries in zip(*(line[1] for line in lines), strict=True)]
    results = {
        **checkpoint.provenance(),
        "arch": backbone.arch,
        "checkpoint": str(args.resume) if args.resume else None,
        "seed": args.seed,
        "split": args.split,
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "merging": merging,
        "skipped_records": skipped,
        "summary": {
            name: dict(zip(columns, map(plain, summaries), strict=True))
            for name, summaries in [*lines, ("average", averages)]
        },
        "rows": rows,
    }
    out = args.output_dir / "results.json"
    checkpoint.replace_file(out, lambda part: part.write_text(json.dumps(results, indent=1)))
    report.accuracy_picture(args.output_dir / "accuracy.png", columns, [*lines, ("average", averages)])
    print(f"accuracy on {args.split} episodes in per cent, 95% intervals; merging: {merging['how']}")
    print(report.table(columns, [*lines, ("average", averages)]))
    if skipped:
        print(f"{skipped} damaged records were passed over")
    print(f"wrote {out} and {args.output_dir / 'accuracy.png'}")
    return 0


def plain(summary: Summary) -> dict:
    """A summary in JSON, which has no infinity: null stands for the interval of a single episode."""
    return summary._asdict() | {"interval": summary.interval if math.isfinite(summary.interval) else None}


def predictor(
    args: argparse.Namespace, backbone: Backbone, open_source: Callable[..., EpisodeReader]
) -> tuple[Predictor, dict]:
    """The predictor that the flags ask for, and how its settings came about."""
    if args.resume is None:
        return pretrained_predictor(backbone), {"how": "none, the pretrained network"}
    saved = checkpoint.load(args.resume)
    checkpoint.check_architecture(args.resume, saved.pool, backbone.weights, backbone.arch)
    pool = saved.pool.to(backbone.device)
    if args.deploy == "vanilla" and len(pool) > 1:
        raise InputError(
            f"--deploy vanilla takes a single adapter, {args.resume} holds {len(pool)}: merge-vanilla"
        )
    trims = tuple(args.trim)
    options.check_trims((*trims, *args.trim_candidates), pool)
    for note in saved.about.get("notes", ()):
        print(f"note: {args.resume}: {note}")
    known = saved.about.get("levels_from") != "nowhere"
    about = {"epsilons": [level.epsilon for level in pool.levels] if known else "unknown"}
    coefficients = fixed_coefficients(args, pool)
    if coefficients is not None:
        shown = ", ".join(f"{c:.3g}" for c in coefficients)
        about |= {"how": f"fixed coefficients {shown}", "coefficients": coefficients}

        def choose(*_):
            return coefficients

    else:
        routing, chosen_by = options.routing(args), "as given"
        if args.select_on:
            valid = open_source(source=args.select_on, split="VALID", n_episodes=args.nSelectEpisode)
            waiting = tqdm(episode_loader(valid), desc=f"choosing on {args.select_on} VALID", unit="episode")
            selection = select(
                backbone,
                pool,
                [episode.to(backbone.device) for episode in waiting],
                routing,
                options.attacks(args),
                trims,
                args.trim_candidates,
                args.seed,
            )
            routing, trims = selection.routing, trims + selection.trims
            about["candidates"] = selection.scores
            chosen_by = f"chosen on {args.nSelectEpisode} VALID episodes of {args.select_on}"
        about |= {
            "how": f"{args.routing}, beta {routing.beta:g} and gamma {routing.gamma:g} {chosen_by}",
            "routing": dataclasses.asdict(routing),
        }
        choose = partial(route, backbone, pool, routing=routing)
    if trims:
        about["how"] += "; trimmed " + ", ".join(f"{t.layer}:{t.block}:{t.keep:g}" for t in trims)
        about["how"] += " (the last one chosen there, too)" if len(trims) > len(args.trim) else " as given"
    about["trims"] = [dataclasses.asdict(trim) for trim in trims]
    return merged_predictor(backbone, pool, choose, trims, args.seed), about


def fixed_coefficients(args: argparse.Namespace, pool: LoRAPool) -> Coefficients | None:
    """The coefficients that the flags fix for every task, or None if a router decides."""
    if args.specified_expert is not None:
        beyond = [p for p in args.specified_expert if p >= len(pool)]
        if beyond:
            raise InputError(
                f"--specified_expert {beyond[0]}: {args.resume} holds adapters 0 to {len(pool) - 1}"
            )
        return average_of(pool, args.specified_expert)
    if args.coefficients is not None:
        if len(args.coefficients) != len(pool):
            raise InputError(
                f"--coefficients has {len(args.coefficients)} values, "
                f"{args.resume} holds {len(pool)} adapters"
            )
        return tuple(args.coefficients)
    return uniform(pool) if args.routing == "uniform" else None


if __name__ == "__main__":
    exit_on_bad_input(main)
