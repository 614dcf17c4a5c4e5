"""From settings to a predictor: each way of merging, the knob from clean to robust, and honest selection."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, moved_apart, patterned_episode, random_backbone
from torch import Tensor, nn

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.deploy import STAMP, check_deployment, deploy, earlier_note
from amt.evaluation.evaluate import evaluate
from amt.evaluation.needs import check_trims
from amt.evaluation.select import support_predictor
from amt.evaluation.settings import Deployment
from amt.models.architectures import Arch
from amt.models.heads import prototypes
from amt.models.network import Network, features
from amt.models.pool import Merged, Pool, pretrained_pool, principal_pool
from amt.models.trim import Trim
from amt.models.weights import stream
from amt.tasks.classifier import Classifier, head_classifier
from amt.tasks.merge import augment, route, soup, uniform
from amt.tasks.settings import Finetuning, Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
LEVELS = [Perturbation(8, 2), Perturbation(1, 0.25), Perturbation(0.1, 0.025)]
HALF = Trim("qkv", -1, 0.5)
GRID = tuple(Routing(beta=b, gamma=g) for b in (1.0, 100.0) for g in (0.4, 1.0))


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    return moved_apart(principal_pool(network.weights, 2, LEVELS), 0.3)


@pytest.fixture(scope="module")
def full(network) -> Pool:
    return moved_apart(pretrained_pool(network.weights, LEVELS), 0.05)


make_episode = partial(patterned_episode, n_way=3, shots=2, queries=4)


def nowhere(source, split, n, seed):
    raise AssertionError(f"{split} episodes of {source} were asked for")


class Episodes:
    """Episodes by split, and what was asked for."""

    def __init__(self, **n_by_split: int):
        self.n_by_split, self.asked = n_by_split, []

    def __call__(self, source, split, n, seed):
        self.asked.append((source, split, n, seed))
        if split not in self.n_by_split:
            raise InputError(f"source {source!r}: {split} has no classes; splits with classes: TEST")
        return [dataclasses.replace(make_episode(k + (seed or 0)), index=k) for k in range(n)]


def poisoned(episode: Episode) -> Episode:
    """The same support set with queries that spoil whatever looks at them."""
    return dataclasses.replace(
        episode,
        query=torch.full_like(episode.query, math.nan),
        query_labels=torch.zeros_like(episode.query_labels),
    )


def same_classifier(one: Classifier, other: Classifier, images: Tensor) -> bool:
    return one.coefficients == other.coefficients and torch.equal(one.logits(images), other.logits(images))


# --- ways of merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pool", "full"])
@pytest.mark.parametrize(
    ("deployment", "coefficients", "how"),
    [
        (Deployment(routing="uniform"), (1 / 3,) * 3, "fixed coefficients 0.333, 0.333, 0.333"),
        (Deployment(coefficients=(0.2, 0.8, 0.0)), (0.2, 0.8, 0.0), "fixed coefficients 0.2, 0.8, 0"),
        (Deployment(experts=(0, 2)), (0.5, 0.0, 0.5), "fixed coefficients 0.5, 0, 0.5"),
        (
            Deployment(experts=(1,), trims=(HALF,)),
            (0.0, 1.0, 0.0),
            "fixed coefficients 0, 1, 0; trimmed qkv:-1:0.5 as given",
        ),
    ],
)
def test_fixed_shares(network, kind, request, deployment, coefficients, how):
    """Of LoRAs and of complete weight sets alike."""
    pool = request.getfixturevalue(kind)
    predict, about = deploy(network, pool, deployment, "tiny", nowhere)
    assert predict(make_episode(0)).coefficients == coefficients
    assert about["how"] == how and about["coefficients"] == list(coefficients)
    assert about["epsilons"] == [8, 1, 0.1] and "candidates" not in about


@pytest.mark.parametrize("epsilon", [0, 8])
def test_a_router_decides_per_task(network, pool, epsilon):
    routing = Routing(beta=10, gamma=0.4, top_k=1, epsilon=epsilon)
    predict, about = deploy(network, pool, Deployment(routings=(routing,)), "tiny", nowhere, seed=3)
    episode = make_episode(1)
    generator = stream(3, episode.index, 1)
    expected = route(network, pool, episode.support, episode.support_labels, generator, routing)
    assert predict(episode).coefficients == expected
    knob = ", route_epsilon 8" if epsilon else ""
    assert about["how"] == f"amt, beta 10 and gamma 0.4, top 1{knob} as given"
    assert about["routing"]["epsilon"] == epsilon


def test_a_soup_averages_the_factors(network, pool):
    """W_res + mean(B) mean(A): for LoRAs another network than the uniform merge."""
    predict, about = deploy(network, pool, Deployment(routing="soup"), "tiny", nowhere)
    episode = make_episode(0)
    by_hand = dict(pool.residual)
    for name, residual in pool.residual.items():
        if name in pool.A:
            product = pool.B[name].mean(0) @ pool.A[name].mean(0)
            by_hand[name] = residual + product.reshape(residual.shape)
    by_hand = Merged(by_hand, pool.scale.mean(), pool.bias.mean())
    expected = head_classifier(network, by_hand, episode)
    classifier = predict(episode)
    assert torch.allclose(classifier.logits(episode.query), expected.logits(episode.query), atol=1e-4)
    assert classifier.coefficients == uniform(pool) == tuple(about["coefficients"])
    assert about["how"] == "soup of the factors of 3 adapters"
    merged, _ = deploy(network, pool, Deployment(routing="uniform"), "tiny", nowhere)
    assert not torch.allclose(
        merged(episode).logits(episode.query), classifier.logits(episode.query), atol=1e-2
    )


def test_a_soup_of_complete_weights_is_their_uniform_merge(network, full):
    merged, stewed = full.merge(uniform(full)), soup(full).merge((1.0,))
    assert all(torch.allclose(merged[name], stewed[name], atol=1e-6) for name in merged)


def test_a_soup_of_one_is_that_one(pool):
    alone, stewed = pool[1].merge((1.0,)), soup(pool[1]).merge((1.0,))
    assert all(torch.equal(alone[name], stewed[name]) for name in alone)


def test_without_a_pool_the_pretrained_network_is_deployed(network):
    predict, about = deploy(network, None, Deployment(), "tiny", nowhere)
    assert about == {"how": "none, the pretrained network"} and predict(make_episode(0)).coefficients == ()


def test_a_single_adapter_needs_no_router(network, pool, monkeypatch):
    predict, about = deploy(network, pool[1], Deployment(select="support", routings=GRID), "tiny", nowhere)
    assert about["how"] == "fixed coefficients 1" and predict(make_episode(0)).coefficients == (1.0,)


@pytest.mark.parametrize("trims", [(), (HALF,)])
def test_fixed_weights_are_made_once_for_all_tasks(network, pool, trims, monkeypatch):
    merges = []
    real = Pool.merge
    monkeypatch.setattr(Pool, "merge", lambda self, c: merges.append(tuple(c)) or real(self, c))
    for deployment in (Deployment(routing="uniform", trims=trims), Deployment(routing="soup", trims=trims)):
        predict, _ = deploy(network, pool, deployment, "tiny", nowhere)
        for k in range(3):
            predict(make_episode(k))
    assert len(merges) == 2


def test_a_router_merges_every_adapter_once_for_all_tasks(network, pool, monkeypatch):
    """And the chosen mixture once per task."""
    merges = []
    real = Pool.merge
    monkeypatch.setattr(Pool, "merge", lambda self, c: merges.append(len(self)) or real(self, c))
    predict, _ = deploy(network, pool, Deployment(), "tiny", nowhere)
    for k in range(4):
        predict(make_episode(k))
    assert merges.count(1) == len(pool) and merges.count(len(pool)) == 4


@pytest.mark.parametrize("kind", ["pool", "full", None])
def test_fine_tuning_starts_from_the_network_deployed(network, kind, request):
    """At rate 0 it stays there; the shares are still told."""
    pool = request.getfixturevalue(kind) if kind else None
    still, moving = Finetuning(steps=2, lr=0), Finetuning(steps=2, lr=0.01)
    plain = Deployment(routing="uniform", trims=(HALF,) if kind else ())
    episode = make_episode(0)
    expected = deploy(network, pool, plain, "tiny", nowhere)[0](episode)
    predict, about = deploy(network, pool, dataclasses.replace(plain, finetune=still), "tiny", nowhere)
    assert same_classifier(predict(episode), expected, episode.query)
    assert about["how"].endswith("; tuned to every task in 2 steps of 0")
    predict, _ = deploy(network, pool, dataclasses.replace(plain, finetune=moving), "tiny", nowhere)
    assert not same_classifier(predict(episode), expected, episode.query)


# --- the knob from clean to robust -----------------------------------------------------------------------

SIDE, WAYS = 6, 3


class Filters(nn.Module):
    """A network that is one matrix: features are how much of each of its rows an image contains."""

    dynamic_img_size = True
    patch_embed = SimpleNamespace(feat_ratio=lambda: 1)

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(WAYS, 3 * SIDE * SIDE), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.rows.T


@pytest.fixture(scope="module")
def world() -> tuple[Network, Pool, Episode]:
    """Classes differ in a channel's brightness, loudly and noisily, and in a faint pattern, always alike.

    Member 0 sees the pattern alone, which an attack within 8/255 can wipe out; member 1 the channel.
    """
    generator = torch.Generator().manual_seed(0)
    faint = torch.linalg.qr(torch.randn(3 * SIDE * SIDE, WAYS, generator=generator)).Q.T
    faint = F.normalize(
        faint - faint.view(WAYS, 3, -1).mean(2, keepdim=True).expand(-1, -1, SIDE**2).reshape(WAYS, -1)
    )
    loud = torch.eye(3)[:, :, None].expand(WAYS, 3, SIDE * SIDE).reshape(WAYS, -1) / SIDE

    def draw(each: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(WAYS).repeat(each)
        brightness = 0.25 * torch.eye(WAYS)[labels] + 0.06 * torch.randn(
            len(labels), WAYS, generator=generator
        )
        images = 0.4 + brightness @ loud * SIDE + 0.1 * faint[labels]
        return images.view(-1, 3, SIDE, SIDE).clamp(0, 1), labels

    network = Network("filters", Filters(), SIDE, mean=(0.4,) * 3, std=(1.0,) * 3)
    levels = (Perturbation(0.1, 0.025), Perturbation(8, 2))
    members = Pool(
        {}, {}, {}, torch.full((2,), 10.0), torch.zeros(2), levels, {"rows": torch.stack([faint, loud])}
    )
    return network, members, Episode(*draw(5), *draw(8), source="made", index=0)


def test_the_knob_leads_from_the_clean_to_the_robust_member(world):
    """The faint pattern makes the tidier classes on clean images; an attack leaves nothing of it."""
    network, pool, episode = world
    attack = Attack("pgd", (8,), steps=10)
    shares, rows = [], []
    for epsilon in (0, 1, 2, 4, 8):
        routing = Routing(beta=100, gamma=0.6, augment_probability=0, epsilon=epsilon)
        predict, _ = deploy(network, pool, Deployment(routings=(routing,)), "made", nowhere)
        (row,) = evaluate(predict, [episode], [attack])
        shares.append(row["coefficients"][1])
        rows.append(row)
    assert shares[0] < 0.2 and shares[-1] > 0.9
    assert shares == sorted(shares)
    assert rows[0]["pgd10@8"] == 0 and rows[-1]["pgd10@8"] > 0.5
    assert rows[0]["clean"] >= rows[-1]["clean"]


def test_on_the_support_set_too_robustness_is_chosen_only_where_it_is_asked_for(world):
    network, pool, episode = world
    single = [(1.0, 0.0), (0.0, 1.0)]
    for epsilon, expected in ((0, (1.0, 0.0)), (8, (0.0, 1.0))):
        assert support_predictor(network, pool, single, epsilon=epsilon)(episode).coefficients == expected
        deployment = Deployment(routing="best", select="support", support_epsilon=epsilon)
        predict, _ = deploy(network, pool, deployment, "made", nowhere)
        assert predict(episode).coefficients == expected


def test_without_the_knob_the_routing_is_the_published_one(network, pool):
    """Its formulas written out: augmented support, plain prototypes, scores, the best two."""
    episode, n_way = make_episode(2), 3
    support, labels = episode.support, episode.support_labels
    generator = torch.Generator().manual_seed(5)
    assert torch.rand((), generator=generator) < 0.9
    view = network.denormalise(augment(network.normalise(support), generator))
    scores = []
    for p in range(len(pool)):
        weights = pool.merge([float(p == k) for k in range(len(pool))])
        with torch.no_grad():
            centres = prototypes(features(network, weights, support), labels)
            seen = features(network, weights, view)
        cosine = F.cosine_similarity(seen[:, None], centres[None], dim=2)
        intra = sum(cosine[labels == c, c].mean() for c in range(n_way)) / n_way
        inter = sum(cosine[labels == c][:, [k for k in range(n_way) if k != c]].mean() for c in range(n_way))
        scores.append(float(0.6 * intra - 0.4 * inter / n_way))
    strength = [math.exp(3 * score - 3) for score in scores]
    best = sorted(range(3), key=lambda p: -strength[p])[:2]
    expected = [strength[p] / sum(strength[k] for k in best) if p in best else 0 for p in range(3)]
    generator = torch.Generator().manual_seed(5)
    found = route(network, pool, support, labels, generator, Routing(beta=3, epsilon=0))
    assert found == pytest.approx(expected, abs=1e-5)


# --- selection -------------------------------------------------------------------------------------------


def test_valid_looks_at_the_domains_own_valid_episodes_and_at_nothing_else(network, pool):
    episodes = Episodes(VALID=4)
    deployment = Deployment(routings=GRID, trim_candidates=(HALF,), select="valid", select_episodes=4)
    attacks = (Attack("autoattack", (2,)),)
    titles = []
    predict, about = deploy(
        network,
        pool,
        deployment,
        "tiny",
        episodes,
        attacks,
        progress=lambda found, title: titles.append(title) or found,
    )
    assert episodes.asked == [("tiny", "VALID", 4, None)] * 2  # once more for the trimmings
    assert set(titles) == {"choosing on tiny VALID"}
    assert "chosen on 4 VALID episodes of tiny under pgd10-ce+dlr@2" in about["how"] and "stamp" not in about
    assert len(about["candidates"]) == len(GRID) + 1
    chosen = Routing(**about["routing"])
    assert chosen in GRID and len(about["trims"]) == about["how"].count("trimmed")
    fixed = dataclasses.replace(
        deployment, select="none", routings=(chosen,), trims=(HALF,) * len(about["trims"]), trim_candidates=()
    )
    expected, _ = deploy(network, pool, fixed, "tiny", nowhere)
    episode = make_episode(9)
    assert same_classifier(predict(episode), expected(episode), episode.query)
    assert same_classifier(predict(poisoned(episode)), expected(episode), episode.query)


def test_another_sources_valid_episodes_may_be_named(network, pool):
    episodes = Episodes(VALID=2)
    deployment = Deployment(routing="best", select="valid", select_on="other", select_episodes=2)
    predict, about = deploy(network, pool, deployment, "tiny", episodes)
    assert episodes.asked == [("other", "VALID", 2, None)]
    best = about["coefficients"].index(1)
    assert about["how"] == f"best single adapter, adapter {best} chosen on 2 VALID episodes of other"
    scores = [score for _, score in about["candidates"]]
    assert scores.index(max(scores)) == best and predict(make_episode(0)).coefficients[best] == 1


def test_what_was_decided_is_deployed_again_without_choosing(network, pool):
    """From what merging.json holds, for a run that goes on or another domain that chooses alike."""
    for routing in ("amt", "best", "soup"):
        deployment = Deployment(
            routing=routing,
            routings=GRID if routing == "amt" else (),
            select="valid",
            select_episodes=2,
            trim_candidates=(HALF,),
        )
        predict, about = deploy(network, pool, deployment, "tiny", Episodes(VALID=2))
        again, note = deploy(network, pool, deployment, "tiny", nowhere, note=json.loads(json.dumps(about)))
        assert note == about
        episode = make_episode(3)
        assert same_classifier(predict(episode), again(episode), episode.query)


def test_a_note_that_does_not_say_what_was_chosen_is_named(network, pool):
    deployment = Deployment(routings=GRID, select="valid")
    damaged = ({}, {"trims": [], "routing": {"alpha": 1}}, {"trims": 5})
    for note in damaged:
        with pytest.raises(InputError, match=r"merging\.json is damaged"):
            deploy(network, pool, deployment, "tiny", nowhere, note={"how": "x", **note})


def test_domains_that_choose_on_the_same_episodes_share_a_note():
    """Their own note counts more; who chooses on its own episodes shares nothing."""
    same, own = Deployment(select="valid", select_on="x"), Deployment(select="valid")
    deployments = {"a": same, "b": same, "c": own, "d": own, "e": dataclasses.replace(same, split="VALID")}
    notes = {"a": {"how": "1"}, "c": {"how": "2"}}
    found = {source: earlier_note(source, deployments, notes) for source in deployments}
    assert found == {"a": notes["a"], "b": notes["a"], "c": notes["c"], "d": None, "e": None}
    assert earlier_note("b", deployments, notes | {"b": {"how": "3"}}) == {"how": "3"}
    assert earlier_note("a", deployments, {"gone": {"how": "4"}}) is None


def test_the_published_protocol_says_what_it_is(network, pool):
    """Six labelled episodes of the scored split with a seed of their own, no attack; and a stamp."""
    episodes = Episodes(TEST=6)
    deployment = Deployment(routings=GRID, select="published")
    _, about = deploy(network, pool, deployment, "tiny", episodes, (Attack("pgd", (8,)),))
    assert episodes.asked == [("tiny", "TEST", 6, 1234)]
    assert about["how"].endswith("chosen on labelled test episodes (published protocol)")
    assert about["stamp"] == STAMP and "labelled" in STAMP and "published protocol" in STAMP
    assert [name for name, _ in about["candidates"]] == [f"beta {r.beta:g}, gamma {r.gamma:g}" for r in GRID]


def test_the_support_decides_by_itself(network, pool):
    """No episode is asked for, and a task's queries change nothing."""
    deployment = Deployment(
        routings=GRID,
        select="support",
        support_epsilon=4,
        trims=(HALF,),
        trim_candidates=(Trim("fc1", -1, 0.5),),
    )
    predict, about = deploy(network, pool, deployment, "tiny", nowhere)
    assert about["how"] == (
        "amt, one of 4 settings and at most one of 1 trimmings chosen for every task by leave-one-out on its "
        "support set, its images attacked within 4/255; trimmed qkv:-1:0.5 as given"
    )
    episode = make_episode(4)
    assert same_classifier(predict(episode), predict(poisoned(episode)), episode.query)


@pytest.mark.parametrize("select", ["valid", "support", "published"])
@pytest.mark.parametrize("routing", ["uniform", "soup"])
def test_the_trimming_of_a_fixed_merge_can_be_chosen(network, full, select, routing):
    """Of complete weights as well; a soup stays told by its shares."""
    deployment = Deployment(
        routing=routing, routings=(), select=select, select_episodes=2, trim_candidates=(HALF,)
    )
    predict, about = deploy(network, full, deployment, "tiny", Episodes(VALID=2, TEST=6))
    assert predict(make_episode(0)).coefficients == uniform(full)
    assert len(about["candidates"]) == (2 if select != "support" else 1)


# --- what does not fit -----------------------------------------------------------------------------------


def check(pool: Pool | None, deployment: Deployment, **n_by_split: int) -> None:
    check_deployment(deployment, pool, "tiny", Episodes(**n_by_split), "runs/pool.safetensors")


@pytest.mark.parametrize("kind", ["pool", "full"])
@pytest.mark.parametrize(
    ("deployment", "words"),
    [
        (Deployment(experts=(0, 3)), ["--specified_expert 3", "runs/pool.safetensors", "0 to 2"]),
        (Deployment(coefficients=(1.0,)), ["--coefficients has 1 values", "3 adapters"]),
        (Deployment(single=True), ["--deploy vanilla", "holds 3"]),
        (Deployment(trims=(Trim("norm1", -1, 0.5),)), ["--trim norm1:-1:0.5"]),
        (Deployment(trim_candidates=(Trim("qkv", 7, 0.5),)), ["--trim qkv:7:0.5"]),
        (Deployment(finetune=Finetuning()), ["--deploy finetune", "one network"]),
        (
            Deployment(finetune=Finetuning(), routing="best", select="support"),
            ["--deploy finetune", "one network"],
        ),
        (
            Deployment(routings=GRID, select="valid"),
            ["--select valid", "'tiny'", "VALID has no classes", "--select_on"],
        ),
        (Deployment(routings=GRID, select="valid", select_on="other"), ["'other'", "VALID has no classes"]),
    ],
)
def test_settings_that_do_not_fit_the_pool_or_the_domain(request, kind, deployment, words):
    message = str(
        fails("tiny|pool|--|other", lambda: check(request.getfixturevalue(kind), deployment, TEST=6))
    )
    assert all(word in message for word in words), message


def test_what_fits_passes_and_reads_nothing(pool, full):
    for each in (pool, full, pool[0]):
        check(each, Deployment(routings=GRID, select="valid", trims=(HALF,)), VALID=1)
        check(each, Deployment(routings=GRID, select="support", support_epsilon=8))
        check(each, Deployment(routing="uniform", finetune=Finetuning()))
        check(each, Deployment(routing="best", select="valid", finetune=Finetuning()), VALID=1)
    check(None, Deployment())
    check(pool[0], Deployment(single=True))
    check_trims([Trim("attn.qkv", 1, 0.3), Trim("fc2", -1, 1.0)], full)


def test_a_deployment_is_plain_data():
    """What decides a run's rows goes into its run.json."""
    each = Deployment(routings=GRID, trims=(HALF,), finetune=Finetuning())
    assert json.loads(json.dumps(dataclasses.asdict(each)))["routings"][0]["beta"] == 1
