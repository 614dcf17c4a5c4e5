"""Heads in tasks: mixtures, attacks through the fit, statistics under attack, and both commands."""

import dataclasses
from functools import partial

import pytest
import torch
from commands import about, called, same_tensors
from conftest import fails, moved_apart, patterned_episode, random_backbone
from safetensors.torch import load_file
from toy_training import assert_refused, command, strict_json

from amt.__main__ import main as amt
from amt.attacks.evaluation import attack_support
from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.deploy import deploy
from amt.evaluation.evaluate import evaluate
from amt.evaluation.needs import check_heads
from amt.evaluation.settings import Deployment
from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.models import network as models_network
from amt.models.architectures import Arch
from amt.models.head_settings import TRAINED, Head, default_head
from amt.models.heads import PoolStatistics
from amt.models.pool import principal_pool
from amt.tasks.classifier import head_classifier, pretrained
from amt.training import head_statistics as heads_measured
from amt.training.head_statistics import covariances, measure_statistics
from amt.training.meta_tune import OUTCOMES, started

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
ROBUST = default_head("robust-lda")
MIX = dataclasses.replace(ROBUST, other="pretrained", share=0.7)


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network):
    return moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2), Perturbation(1, 0.25)]), 0.3)


@pytest.fixture(scope="module")
def known(network, pool) -> PoolStatistics:
    return measure_statistics(network, pool, pretrained(network), map(patterned_episode, range(6)), 0)


@pytest.fixture(scope="module")
def five_shot():
    return patterned_episode(50, shots=5, queries=4)


@pytest.fixture(scope="module")
def one_shot():
    return patterned_episode(51, shots=1, queries=4)


def classifier(network, pool, known, episode, head, shares=(0.5, 0.5)):
    second = {None: lambda: None, "pretrained": lambda: pretrained(network)}.get(
        head.other, lambda: pool[head.other].merged((1.0,))
    )()
    return head_classifier(network, pool.merged(shares), episode, shares, head, known, second)


# --- classifiers of a task -------------------------------------------------------------------------------


def test_the_default_head_is_the_published_classifier_to_the_bit(network, pool, known, five_shot):
    ours = classifier(network, pool, known, five_shot, Head())
    published = head_classifier(network, pool.merged((0.5, 0.5)), five_shot, (0.5, 0.5))
    assert torch.equal(ours.logits(five_shot.query), published.logits(five_shot.query))


@pytest.mark.parametrize("other", ["pretrained", 1])
def test_a_mixture_with_all_of_one_network_is_that_network(network, pool, known, five_shot, other):
    """Share 1 is the first network, share 0 the second, each with its own statistics."""
    mixed = dataclasses.replace(ROBUST, other=other)
    first = classifier(network, pool, known, five_shot, ROBUST)
    whole = classifier(network, pool, known, five_shot, dataclasses.replace(mixed, share=1.0))
    assert torch.allclose(whole.logits(five_shot.query), first.logits(five_shot.query), atol=1e-4)
    shares = (0.0, 1.0) if other == 1 else ()
    merged = pool.merged(shares) if shares else pretrained(network)
    second = head_classifier(network, merged, five_shot, shares, ROBUST, known)
    none = classifier(network, pool, known, five_shot, dataclasses.replace(mixed, share=0.0))
    assert torch.allclose(none.logits(five_shot.query), second.logits(five_shot.query), atol=1e-4)
    assert not torch.allclose(none.logits(five_shot.query), first.logits(five_shot.query), atol=0.1)


@pytest.mark.parametrize("head", [ROBUST, MIX], ids=["robust-lda", "mix"])
@pytest.mark.parametrize("shots", ["one_shot", "five_shot"])
def test_attacks_see_the_whole_head(network, pool, known, head, shots, request):
    """The gradient by a query image and by a support image, whose covariance it moves too, agree with finite
    differences of what classifies."""
    episode = request.getfixturevalue(shots)
    found = classifier(network, pool, known, episode, head)
    assert torch.allclose(found.refit(episode.support)(episode.query), found.logits(episode.query), atol=1e-4)

    def loss(support, query):
        return found.refit(support)(query).square().sum()

    points = [each.clone().requires_grad_() for each in (episode.support, episode.query)]
    slopes = torch.autograd.grad(loss(*points), points)
    for k, slope in enumerate(slopes):
        assert slope.abs().sum() > 0
        step = 2e-3 * slope / slope.norm()
        ahead, behind = ([each.detach() for each in points] for _ in range(2))
        ahead[k], behind[k] = ahead[k] + step, behind[k] - step
        found_slope = float(loss(*ahead) - loss(*behind)) / 4e-3
        assert found_slope == pytest.approx(float(slope.norm()), rel=0.1)


def test_an_attack_on_the_covariance_goes_through_the_fit(network, pool, known, five_shot):
    """The support attack refits the head at every step with gradients, and the harm it reports is that of the
    head fitted to the moved support."""
    found = classifier(network, pool, known, five_shot, ROBUST)
    fitted_to = []

    def fit(support):
        fitted_to.append(support.requires_grad)
        return found.refit(support)

    attack = Attack("support", (16,), steps=4)
    labels = found.logits(five_shot.query).argmax(1)
    moved = attack_support(attack, 16, fit, five_shot.support, five_shot.query, labels, torch.Generator())
    assert sum(fitted_to) == 4 and moved.fooled.any()
    refitted = found.refit(moved.images)(five_shot.query).argmax(1)
    assert torch.equal(refitted != labels, moved.fooled)


def test_rows_of_a_domain_are_attacked_with_the_chosen_head(network, pool, known, five_shot):
    deployment = Deployment(coefficients=(0.5, 0.5), heads=(MIX,))
    attacks = [Attack("pgd", (8,), steps=3), Attack("support", (8,), steps=2)]
    predict, note = deploy(network, pool, deployment, "tiny", None, attacks, statistics=known)
    (row,) = evaluate(predict, [five_shot], attacks)
    assert {"clean", "pgd3@8", "support-pgd2@8"} <= row.keys()
    assert note["how"].endswith(f"head {MIX.name} as given")
    assert note["head"] == dataclasses.asdict(MIX) and "augmented views" in note["head_at_one_shot"]


def test_the_head_is_chosen_on_validation_episodes(network, pool, known):
    """Candidates are every head with every merge; what was chosen is noted and is not chosen again."""
    heads = (Head(), default_head("lda"), Head("ridge", penalty=1e6))
    deployment = Deployment(routing="best", select="valid", select_episodes=2, heads=heads)

    def episodes(*_):
        return [dataclasses.replace(patterned_episode(k, shots=3), index=k) for k in range(2)]

    predict, note = deploy(network, pool, deployment, "tiny", episodes, statistics=known)
    assert [name for name, _ in note["candidates"]] == [
        f"adapter {p}, {head.name}" for p in range(2) for head in heads
    ]
    assert Head(**note["head"]) in heads and "chosen on 2 VALID episodes of tiny" in note["how"]
    again, _ = deploy(network, pool, deployment, "tiny", None, statistics=known, note=note)
    query = episodes()[0].query
    assert torch.equal(predict(episodes()[0]).logits(query), again(episodes()[0]).logits(query))


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (
            ROBUST,
            r"^POOL: holds no statistics for --head robust-lda; add them: python -m amt pool POOL --stat",
        ),
        (dataclasses.replace(default_head("lda"), other=2), "holds adapters 0 to 1, expected one of them"),
    ],
)
def test_heads_that_the_pool_cannot_serve_are_refused(pool, head, told):
    fails(told, partial(check_heads, [head], pool, None, "POOL", 12))


def test_statistics_of_another_network_are_refused(pool, known):
    fails("its statistics are of 12 features", partial(check_heads, [ROBUST], pool, known, "POOL", 24))
    fails("needs a pool", partial(check_heads, [MIX], None, None, "the pretrained network", 12))


# --- statistics ------------------------------------------------------------------------------------------


def test_statistics_are_the_same_in_any_batches_and_every_time(network, pool, monkeypatch):
    networks = [lambda: pool.merged((1.0, 0.0)), lambda: pretrained(network)]
    found = []
    for chunk in (64, 64, 2):
        for module in (heads_measured, models_network):
            monkeypatch.setattr(module, "CHUNK", chunk)
        found.append(covariances(network, networks, map(patterned_episode, range(3)), 5))
    first, again, small = found
    for one, two, three in zip(first, again, small, strict=True):
        for name in ("source", "attack"):
            expected = getattr(one, name)
            assert torch.equal(getattr(two, name), expected)
            assert torch.allclose(getattr(three, name), expected, rtol=1e-3, atol=1e-6)
            assert torch.equal(expected, expected.T) and torch.linalg.eigvalsh(expected).min() > -1e-6
    assert not torch.allclose(first[0].attack, first[1].attack)


def test_statistics_need_episodes(network, pool):
    fails("several images per class", lambda: covariances(network, [lambda: pretrained(network)], [], 0))


def test_there_are_no_statistics_of_features_that_no_file_could_keep(network):
    huge = pretrained(network)._replace(weights=network.weights | {"norm.weight": torch.full((12,), 1e25)})
    fails("not finite or huge", lambda: covariances(network, [lambda: huge], [patterned_episode(0)], 0))


# --- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", TRAINED)
@pytest.mark.parametrize("method", OUTCOMES)
def test_every_head_can_be_trained_with(network, pool, five_shot, head, method):
    """Gradients reach the factors through the fit, and the scale."""
    member = pool[0]
    factors = {name: factor.clone().requires_grad_() for name, factor in member.factors.items()}
    scale = member.scale.clone().requires_grad_()
    level = Perturbation(8, 2, steps=2, gamma=0.01, grids=(0,), scalars=(1.0,))
    member = dataclasses.replace(member.with_factors(factors), scale=scale, levels=(level,))
    start = started([level], five_shot.query, [torch.Generator().manual_seed(0)])
    outcome = OUTCOMES[method](network, member, five_shot, start, 1.0, head)
    found = torch.autograd.grad(outcome.loss.total.sum(), [*factors.values(), scale])
    assert all(each.isfinite().all() and each.abs().sum() > 0 for each in found)


# --- files and commands ----------------------------------------------------------------------------------


def test_checkpoints_keep_statistics_and_old_ones_have_none(pool, known, tmp_path):
    checkpoint.save(tmp_path / "with.safetensors", Checkpoint(pool, {"arch": "tiny"}, statistics=known))
    checkpoint.save(tmp_path / "without.safetensors", Checkpoint(pool, {"arch": "tiny"}))
    found = checkpoint.load(tmp_path / "with.safetensors").statistics
    assert all(torch.equal(found.tensors[name], each) for name, each in known.tensors.items())
    assert checkpoint.load(tmp_path / "without.safetensors").statistics is None
    files = [tmp_path / "with.safetensors", tmp_path / "with.safetensors"]
    ended = called(amt, ["amt", "pool", *files, "--out", tmp_path / "joined.safetensors"])
    assert ended.code == 0 and ended.out.endswith("with statistics for heads\n")
    assert len(checkpoint.load(tmp_path / "joined.safetensors").statistics.source) == 4
    files[1] = tmp_path / "without.safetensors"
    ended = called(amt, ["amt", "pool", *files, "--out", tmp_path / "joined.safetensors"])
    assert ended.code == 0 and "without.safetensors has none; --statistics measures them" in ended.out
    assert checkpoint.load(tmp_path / "joined.safetensors").statistics is None


def test_damaged_statistics_are_one_line(pool, known, tmp_path):
    tensors, saying = checkpoint.packed(Checkpoint(pool, {}, statistics=known))
    wrong = {"statistics/triangles": tensors["statistics/triangles"][:1]}
    checkpoint.write(tmp_path / "pool.safetensors", tensors | wrong, saying)
    fails("damaged statistics: triangles has shape", lambda: checkpoint.load(tmp_path / "pool.safetensors"))


def test_training_measures_what_testing_uses(world, trained, tmp_path):
    """main.py's statistics are those that amt pool measures on the same episodes, and testing needs them."""
    pool = trained[1] / "last.safetensors"
    assert about(pool)["statistics"]["episodes"] == 1 and checkpoint.load(pool).statistics is not None
    epsilons = [level["epsilon"] for level in about(pool)["levels"]]
    recommended = about(pool)["coefficients"]
    assert about(pool)["head"] == "robust-lda" and sum(recommended) == 1
    assert recommended.index(1) == epsilons.index(max(epsilons))
    bare, again = tmp_path / "bare.safetensors", tmp_path / "again.safetensors"
    saved = checkpoint.load(pool)
    checkpoint.save(bare, dataclasses.replace(saved, statistics=None, momentum={}))
    flags = ["--arch", "vit_mini_amt_merge", "--head", "robust-lda", "--num_support", 1]
    refused = command("test_meta_dataset", *world.test(tmp_path / "no", "--resume", bare, *flags))
    assert_refused(refused, tmp_path / "no", f"amt pool {bare} --statistics", "robust-lda")

    words = ["amt", "pool", bare, "--statistics", "--data_path", world.data, "--base_sources", "tiny"]
    words += ["--num_ways", 5, "--num_support", 1, "--num_query", 1, "--statistics_episodes", 1]
    words += ["--pretrained_checkpoint", world.weights, "--num_workers", 0, "--out", again]
    measured = called(amt, words)
    assert measured.code == 0, measured.err
    ours, theirs = load_file(pool), load_file(again)
    names = [name for name in theirs if name.startswith("statistics/")]
    assert len(names) == 2 and all(torch.equal(ours[name], theirs[name]) for name in names)

    out = tmp_path / "out"
    heads = ["--head", "mix", "share=0.6", "--attack", "pgd", "--attack", "support", "epsilon=8"]
    ended = command("test_meta_dataset", *world.test(out, "--resume", again, *heads, *flags[4:]))
    assert ended.code == 0, ended.err
    assert "note: --head mix of=robust-lda share=0.6" in ended.out and "two support images" in ended.out
    results = strict_json(out / "results.json")
    assert results["settings"]["head"] == [["mix", "share=0.6"]]
    assert results["merging"]["tiny"]["head"]["share"] == 0.6
    assert "augmented views" in results["merging"]["tiny"]["head_at_one_shot"]


def test_a_finished_run_gets_the_statistics_it_lacks_once(world, tmp_path):
    flags = world.train(tmp_path / "run", "--epochs", 1, "--nValEpisode", 0)
    assert command("main", *flags, "--statistics_episodes", 0).code == 0
    last = tmp_path / "run" / "last.safetensors"
    assert checkpoint.load(last).statistics is None
    assert "done already" in command("main", *flags).out
    assert checkpoint.load(last).statistics is not None
    straight = world.train(tmp_path / "straight", "--epochs", 1, "--nValEpisode", 0)
    assert command("main", *straight).code == 0
    assert same_tensors(last, tmp_path / "straight" / "last.safetensors")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--head", "lda", "--head", "ridge"], "--select valid chooses among them, found --select none"),
        (["--head", "lda", "--head", "lda"], "--head names a value twice"),
        (["--head", "robust-lda"], "needs a pool; name its checkpoint with --resume"),
        (["--head", "ldaa"], "--head ldaa: did you mean 'lda'?"),
    ],
)
def test_flags_of_heads_that_make_no_sense_are_refused(world, tmp_path, flags, told):
    assert_refused(command("test_meta_dataset", *world.test(tmp_path / "no", *flags)), tmp_path / "no", told)


def test_a_run_is_trained_with_another_head_and_continued_only_with_it(world, tmp_path):
    flags = world.train(tmp_path / "run", "--epochs", 1, "--nValEpisode", 0, "--head", "ridge")
    assert command("main", *flags).code == 0
    assert about(tmp_path / "run" / "last.safetensors")["settings"]["head"] == "ridge"
    refused = command("main", *flags, "--head", "lda")
    assert refused.code == 2 and 'begun with head "ridge", not "lda"' in refused.err
