"""The flags of test_meta_dataset.py, those of its settings' own fields among them: checked, and turned into
attacks and deployments.

Knows no tensors, and of the disk only --domain_config.
"""

import argparse
import itertools
import re
from collections.abc import Sequence

from amt.attacks.kinds import ON_OTHERS, PGD_KINDS, TARGETED, Attack, parse_attack, target_count
from amt.cli.options import texts
from amt.cli.options.common import COUNT, EPSILON, WAYS, add_common, check_episodes, folder_source, sampling
from amt.cli.options.domain_config import DomainSettings, read_domain_config
from amt.cli.options.parsing import Parser, check_coefficients, check_distinct, check_increasing
from amt.evaluation.settings import Deployment, published_grid
from amt.files import ranks
from amt.files.shipped import as_pool
from amt.models.head_settings import PRETRAINED, TEXT, WITH_TEXTS, Head, parse_head
from amt.tasks.settings import BETAS, GAMMAS, Finetuning, Routing
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.settings import Number, add_flags, as_path, from_args

TEST_SOURCES = (
    *("traffic_sign", "mscoco", "ilsvrc_2012", "omniglot", "aircraft"),
    *("cu_birds", "dtd", "quickdraw", "fungi", "vgg_flower"),
)

_NEEDING_A_POOL = ("trim", "trim_candidates", "select_on", "domain_config")
_SEARCHED = ("beta", "gamma", "top_k", "epsilon")  # of Routing, what --select may choose
_FLAGS = {"beta": "blend_beta", "gamma": "blend_gamma"}  # where a domain's setting is not called as its flag
_EPISODES = Number(int, least=0, most=10**7)


def shard(text: str) -> tuple[int, int]:
    """I/N with 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 0 to N - 1, such as 0/2")
    return int(match[1]), int(match[2])


def add_merging(group: argparse._ArgumentGroup) -> None:
    """The flags that say how a pool becomes one network, wherever that is done."""
    add_flags(group, Deployment, "coefficients", "trims")
    add_flags(group, Routing, several=_SEARCHED)


def add_head(
    group: argparse._ArgumentGroup, several: str, default: str = "prototypes", more: str = ""
) -> None:
    """The flag of what classifies the features; `several` says what giving it more than once does, `more`
    what else there is."""
    group.add_argument(
        "--head",
        nargs="+",
        action="append",
        metavar=("NAME", "OPTION=VALUE"),
        help="what classifies the features: prototypes, centred, lda, ridge, robust-lda, or mix of two "
        "networks, with shares such as support=0.3 attack=0.3 identity=0.4, and for mix of=robust-lda "
        f"share=0.8 other=pretrained{several} (default: {default}; docs/explanation/robust-lda.md){more}",
    )


def heads(args: argparse.Namespace) -> tuple[Head, ...] | None:
    """The heads that --head names, in order; None for the default.

    Raises:
        InputError: one of them makes no sense, or two are the same.
    """
    if args.head is None:
        return (WITH_TEXTS,) if vars(args).get("text_prototypes") else None
    found = tuple(parse_head(words) for words in args.head)
    check_distinct("head", [head.name for head in found])
    return found


def single_head(args: argparse.Namespace) -> Head:
    """The head that --head names where there is one classifier; the default if it is not given.

    Raises:
        InputError: it makes no sense, or there are several.
    """
    found = heads(args) or (Head(),)
    if len(found) > 1:
        raise InputError(f"--head is given {len(found)} times, expected once: a classifier has one head")
    return found[0]


def testing_parser() -> Parser:
    """The flags of test_meta_dataset.py."""
    parser = Parser("Evaluate a pool per domain: route, merge, trim, classify; clean and under attack.")
    add_common(parser, "test_sources", TEST_SOURCES, "domains to evaluate on, one after another")
    _add_evaluation(parser)
    _add_attacks(parser)
    _add_running(parser)
    merging = parser.add_argument_group("merging")
    add_merging(merging)
    add_head(merging, "; given several times --select chooses", more=texts.HELP)
    texts.add_texts(merging)
    texts.add_shots(merging)
    add_flags(merging, Deployment)
    merging.add_argument(
        "--domain_config",
        type=as_path,
        metavar="FILE.yaml",
        help="settings per domain, over these flags: beta, gamma, top_k, route_epsilon, trim, search_scale, "
        "search_step, candidate_pool (amt/cli/options/domain_config.py)",
    )
    add_flags(parser.add_argument_group("test-time fine-tuning, with --deploy finetune"), Finetuning)
    precision = "evaluation is in float32, as the attacks need it"
    parser.add_without_effect({"fp16": (0, precision), "bf16": (0, precision)})
    parser.add_published()
    return parser


def _add_evaluation(parser: Parser) -> None:
    """What is evaluated, on which episodes, and where the results go."""
    parser.add_argument(
        "--cdfsl_domains",
        nargs="+",
        metavar="SOURCE",
        help="domains of BSCD-FSL and fine-grained ones instead, --test_n_way --n_shot with 15 queries",
    )
    parser.add_argument("--test_n_way", type=WAYS, default=5, help="ways with --cdfsl_domains")
    parser.add_argument("--n_shot", type=COUNT, default=5, help="shots with --cdfsl_domains")
    parser.add_argument("--arch", required=True, help="backbone, for example vit_mini_amt_merge")
    parser.add_argument(
        "--resume",
        type=as_pool,
        help="checkpoint, ours or a published .pth, or the name of a pool in the box; none: the pretrained "
        "network",
    )
    parser.add_argument("--eval", action="store_true", help="what this script does anyway")
    parser.add_argument(
        "--deploy",
        choices=["vanilla", "merge-vanilla", "finetune"],
        help="vanilla: at most one adapter; merge-vanilla: a pool; finetune: as P>M>F, one network all of "
        "whose weights are tuned on each support set (default: vanilla or merge-vanilla, as --resume holds)",
    )
    parser.add_argument(
        "--output_dir", type=as_path, required=True, help="where results.json and pictures go"
    )
    episodes = Number(int, least=1, most=10**7)
    parser.add_argument("--nTestEpisode", type=episodes, default=600, help="episodes per domain")
    add_flags(parser, Deployment, "split")
    parser.add_argument(
        "--dump", type=as_path, metavar="DIR", help="also write every episode there, in Meta-Dataset's format"
    )


def _add_attacks(parser: Parser) -> None:
    attack = parser.add_argument_group("attack")
    attack.add_argument(
        "--attack",
        nargs="+",
        action="append",
        metavar=("NAME", "OPTION=VALUE"),
        help="any number of times: pgd, apgd, autoattack, fab, square, strong (APGD on both losses, images "
        "made on the pretrained network and every adapter, FAB and Square, each on what is left), pyramid, "
        "transfer (images made on the pretrained network) or support (its images are attacked, not the "
        "queries), with any of norm=l2, epsilon=1,2,4, steps=, restarts=, step_size=, loss=ce|kl|dlr|margin "
        "or several such as ce+dlr, queries=, targets= (default: pgd, loss=ce+dlr)",
    )
    attack.add_argument(
        "--epsilon",
        type=EPSILON,
        nargs="*",
        default=[8.0],
        help="in 1/255 of the pixel range, increasing, for attacks that name none; none: clean only",
    )
    steps = Number(int, least=1, most=10**6)
    attack.add_argument("--attack_iters", type=steps, default=20, help="steps of PGD")
    attack.add_argument(
        "--alpha", type=EPSILON, help="step size of PGD in 1/255 (default: a quarter of each epsilon)"
    )
    attack.add_argument(
        "--probe_episodes",
        type=_EPISODES,
        default=2,
        help="episodes per domain on which the attacks themselves are checked; 0: none",
    )


def _add_running(parser: Parser) -> None:
    running = parser.add_argument_group("run")
    running.add_argument(
        "--samples",
        type=_EPISODES,
        default=1,
        help="episodes per domain whose images are kept for the report",
    )
    running.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do only part I (from 0) of N parts, in processes that share --output_dir "
        "(default: what torchrun says, else everything)",
    )


def check_testing(args: argparse.Namespace) -> None:
    """The same for the flags of test_meta_dataset.py."""
    from amt.models.architectures import base_arch  # brings timm, which --help need not wait for

    base_arch(args.arch)
    given = [flag for flag in ("specified_expert", "coefficients") if getattr(args, flag) is not None]
    if len(given) > 1:
        raise InputError("--specified_expert and --coefficients exclude each other")
    if args.resume is None and (needy := _needing_a_pool(args, given)):
        raise InputError(f"--{needy[0]} needs a pool; name its checkpoint with --resume")
    if args.precision in ("bf16", "fp16"):
        raise InputError(
            f"--precision {args.precision}: attacks need more digits; expected float32, or tf32 on a GPU"
        )
    _check_selection(args, given)
    _check_heads(args)
    if args.cdfsl_domains and args.test_sources:
        raise InputError("--cdfsl_domains and --test_sources exclude each other")
    sources = test_sources(args)
    check_coefficients(args)
    check_increasing(args)
    check_distinct("test_sources", sources)
    check_episodes(args)


def _needing_a_pool(args: argparse.Namespace, given: Sequence[str]) -> list[str]:
    """The flags that were given and mean something for a pool alone."""
    needy = [*given, *(flag for flag in _NEEDING_A_POOL if getattr(args, flag))]
    needy += ["select"] if args.select != "none" else []
    needy += ["routing"] if args.routing != "amt" else []
    needy += ["route_epsilon"] if any(args.route_epsilon or ()) else []
    needy += ["deploy merge-vanilla"] if args.deploy == "merge-vanilla" else []
    return needy


def _check_selection(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Raise an `InputError` for a selection that cannot be, or would look at what it must not."""
    way = selection(args)
    if args.select_on and way != "valid":
        raise InputError(f"--select_on {args.select_on} is for --select valid, found --select {way}")
    if args.select_by != "mean" and way != "valid":
        raise InputError(f"--select_by {args.select_by} is for --select valid, found --select {way}")
    if args.select_by == "robust" and not (args.attack or any(args.epsilon)):
        raise InputError("--select_by robust needs an attack, found --epsilon without a value")
    if args.routing == "oracle" and (way != "none" or args.deploy == "finetune"):
        raise InputError("--routing oracle chooses by the query labels: it excludes --select and finetune")
    if args.trim_candidates and way == "none":
        raise InputError("--trim_candidates are for --select to choose from, for example --select support")
    if given and args.routing != "amt":
        raise InputError(f"--{given[0]} and --routing {args.routing} exclude each other")
    if args.routing == "best" and way == "none":
        raise InputError("--routing best: which adapter is best has to be chosen, say by --select valid")
    if any(args.route_epsilon or ()) and way != "support" and (given or args.routing != "amt"):
        raise InputError("--route_epsilon is for the scores of --routing amt, or for --select support")
    _check_unseen(args, way)
    for flag in ("blend_beta", "blend_gamma", "top_k", "route_epsilon"):
        check_distinct(flag, getattr(args, flag) or ())


def _check_unseen(args: argparse.Namespace, way: str) -> None:
    """Raise an `InputError` where settings would be chosen on the episodes that they are scored on."""
    scored = test_sources(args)
    if args.split == "VALID" and way == "valid" and (args.select_on is None or args.select_on in scored):
        on = f"--select_on {args.select_on}" if args.select_on else "--select valid"
        raise InputError(f"{on} would choose on the very VALID episodes it then scores")


def _check_heads(args: argparse.Namespace) -> None:
    """Raise an `InputError` for several heads and nothing that chooses, or one that sees no attack."""
    found, way = heads(args) or (), selection(args)
    if args.text_prototypes and not args.shots and all(head.other != TEXT for head in found):
        raise InputError(
            f"--head {found[0].name} does not use --text_prototypes; expected --head text, or mix other=text"
        )
    if any(head.zero_shot for head in found) and any(words[0] == "support" for words in args.attack or ()):
        raise InputError("--attack support moves the support set, which --head text does not look at")
    if len(found) > 1 and way not in ("valid", "published"):
        raise InputError(
            f"--head is given {len(found)} times; --select valid chooses among them, found --select {way}"
        )


def test_sources(args: argparse.Namespace) -> tuple[str, ...]:
    """The domains that test_meta_dataset.py evaluates on."""
    return tuple(args.cdfsl_domains or args.test_sources or folder_source(args) or TEST_SOURCES)


def needs_pretrained(args: argparse.Namespace) -> bool:
    """Whether a test needs pretrained weights: without a pool, or for attacks or a head beside one."""
    shown = any(attack.kind in ON_OTHERS for attack in attacks(args))
    mixed = any(head.other == PRETRAINED for head in heads(args) or ())
    return not args.no_pretrain and (args.resume is None or shown or mixed)


def attacks(args: argparse.Namespace) -> tuple[Attack, ...]:
    """The attacks of evaluation.

    Raises:
        InputError: one of them makes no sense, or two have the same name.
    """
    epsilons = [epsilon for epsilon in args.epsilon if epsilon > 0]
    found = []
    for words in args.attack or ([["pgd"]] if epsilons else []):
        own = {word.partition("=")[0]: word.partition("=")[2] for word in words[1:]}
        linf = own.get("norm", "linf") == "linf"  # the norm that --epsilon and --alpha are meant in
        if not linf and "epsilon" not in own:
            raise InputError(f"--attack {' '.join(words)}: another norm than linf needs an epsilon=... too")
        defaults = {"epsilon": epsilons}
        if words[0] in PGD_KINDS:
            defaults |= {"steps": args.attack_iters, "step_size": args.alpha if linf else None}
        found.append(parse_attack(words, **defaults))
    check_distinct("attack", [attack.name for attack in found])
    ways = sampling(args).num_ways or args.min_ways
    for attack in found:
        if attack.kind in TARGETED:
            target_count(attack.kind, ways, attack.targets)
    return tuple(found)


def part(args: argparse.Namespace) -> tuple[int, int]:
    """Which part of how many this process does.

    Raises:
        InputError: torchrun's variables make no sense.
    """
    return args.shard or ranks.place()


def finetuning(args: argparse.Namespace) -> Finetuning:
    """The settings of `--deploy finetune`."""
    return from_args(Finetuning, args)


def routing(args: argparse.Namespace) -> Routing:
    """The settings of the router.

    Raises:
        InputError: a flag has several values.
    """
    (found,) = _routings(args, DomainSettings(), "none", "")
    return found


def routed(args: argparse.Namespace) -> bool:
    """Whether any flag of the router is given."""
    given = (args.blend_beta, args.blend_gamma, args.top_k, args.route_epsilon)
    return any(each is not None for each in given) or args.aug_prob != Routing.augment_probability


def selection(args: argparse.Namespace) -> str:
    """How settings are chosen, one of `SELECTS`: --select_on SOURCE is a way of --select valid."""
    return "valid" if args.select_on and args.select == "none" else args.select


def deployments(args: argparse.Namespace) -> dict[str, Deployment]:
    """By test source how the pool is deployed there.

    Raises:
        InputError: --domain_config is at fault, there are several values and no --select, or a --select and
            nowhere anything to choose from.
    """
    sources, way = test_sources(args), selection(args)
    own = dict.fromkeys(sources, DomainSettings())
    if args.domain_config is not None:
        own = read_domain_config(args.domain_config, sources)
    found = {source: _deployment(args, own[source], source) for source in sources}
    open_to = [
        len(each.routings) > 1
        or each.trim_candidates
        or each.routing == "best"
        or len(each.offered_heads) > 1
        for each in found.values()
    ]
    if way != "none" and not any(open_to):
        raise InputError(
            "--select or --select_on has nothing to choose from: expected --routing amt or best, several "
            "values of a flag, --trim_candidates, or --head several times"
        )
    return found


def _deployment(args: argparse.Namespace, domain: DomainSettings, source: str) -> Deployment:
    way = selection(args)
    where = f"--domain_config {args.domain_config}: {source}: "
    if way == "none" and (domain.search_scale or domain.candidate_pool):
        field = "search_scale" if domain.search_scale else "candidate_pool"
        raise InputError(f"{where}{field} is for --select to choose from, found --select none")
    epsilons = domain.route_epsilon or args.route_epsilon or (Routing.epsilon,)
    routes = args.routing == "amt" and args.specified_expert is None and args.coefficients is None
    given = ("beta", "gamma", "top_k", "route_epsilon", "search_scale")
    idle = [name for name in given if getattr(domain, name) and (name, way) != ("route_epsilon", "support")]
    if idle and not routes:
        raise InputError(f"{where}{idle[0]} is for the scores of --routing amt")
    return from_args(
        Deployment,
        args,
        routings=_routings(args, domain, way, where) if routes else (),
        trims=tuple(args.trim if domain.trim is None else domain.trim),
        trim_candidates=tuple(
            args.trim_candidates if domain.candidate_pool is None else domain.candidate_pool
        ),
        select=way,
        support_epsilon=max(epsilons) if way == "support" else 0.0,
        single=args.deploy == "vanilla",
        finetune=finetuning(args) if args.deploy == "finetune" else None,
        heads=heads(args),
    )


def _routings(args: argparse.Namespace, domain: DomainSettings, way: str, where: str) -> tuple[Routing, ...]:
    """The routers' settings: a domain's own before those of the flags, or what there is to choose from."""
    values = {
        "beta": args.blend_beta or (BETAS if way != "none" else (Routing.beta,)),
        "gamma": args.blend_gamma or (GAMMAS if way != "none" else (Routing.gamma,)),
        "top_k": args.top_k or (Routing.top_k,),
        "route_epsilon": args.route_epsilon or (Routing.epsilon,),
    }
    own = {name: getattr(domain, name) for name in values if getattr(domain, name)}
    if domain.search_scale:
        own["beta"], own["gamma"] = published_grid(domain.search_scale, domain.search_step)
    values |= own
    several = [name for name, found in values.items() if len(found) > 1]
    if way == "none" and several:
        name = several[0]
        flag = f"{where}{name}" if name in own else f"--{_FLAGS.get(name, name)}"
        raise InputError(
            f"{flag} has {len(values[name])} values, expected one; among several chooses --select of "
            "test_meta_dataset.py"
        )
    return tuple(
        Routing(beta, gamma, top_k, args.aug_prob, epsilon)
        for top_k, epsilon, beta, gamma in itertools.product(
            *(values[name] for name in ("top_k", "route_epsilon", "beta", "gamma"))
        )
    )
