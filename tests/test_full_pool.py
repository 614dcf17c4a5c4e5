"""Pools of complete networks: merging, their files, and training by either method or by adversarial querying.

What training computes is compared with a module trained by torch as anybody would write it.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, moved_apart, patterned_episode, random_backbone
from safetensors.torch import load_file
from torch import Tensor
from toy_baselines import ARCH, Plain, identical
from toy_pools import assert_goes_on_exactly, quick, rewritten, trainable

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.cli import export as exporting
from amt.cli import pool as pooling
from amt.files import checkpoint, export
from amt.files.checkpoint import Checkpoint
from amt.models.network import Network
from amt.models.pool import Pool, pretrained_pool, principal_pool
from amt.training.meta_tune import natural_outcome, querying_outcome
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode

ORDINARY = Perturbation(8, 2, steps=3, gamma=0.0, beta=0.0, grids=(0,), scalars=(1.0,), start="random1")
DUAL = Perturbation(8, 2, steps=2, gamma=0.01, grids=(2, 0), scalars=(2.0, 1.0))


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    """Three networks that differ in every weight, and in their heads."""
    moved = moved_apart(pretrained_pool(network.weights, (DUAL, ORDINARY, ORDINARY)))
    return dataclasses.replace(moved, scale=torch.tensor([9.0, 10, 11]), bias=torch.tensor([0.0, 0.1, 0.2]))


@pytest.fixture(scope="module")
def episode() -> Episode:
    return patterned_episode(0, side=16)


def tuner_of(network: Network, start: Pool, method: str, lr: float = 0.01, **settings) -> Tuner:
    usual = {"epochs": 1, "episodes_per_epoch": 100, "warmup_epochs": 0, "momentum": 0.9}
    return Tuner(network, start, TuneSettings(lr=lr, method=method, **(usual | settings)))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> list[str]:
    """Names of the tensors that differ."""
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=atol)]


# --- merging; the laws of every pool are in test_pool_laws -------------------------------------------------


def test_merging_is_the_weighted_sum_and_reaches_every_member(pool):
    leaves = {name: each.clone().requires_grad_() for name, each in pool.factors.items()}
    shares = (0.5, 0.75, -0.25)
    merged = pool.with_factors(leaves).merge(shares)
    expected = {name: sum(c * each[p] for p, c in enumerate(shares)) for name, each in pool.whole.items()}
    assert close(merged, expected) == []
    sum(weight.sum() for weight in merged.values()).backward()
    for leaf in leaves.values():
        for p, share in enumerate(shares):
            assert torch.allclose(leaf.grad[p], torch.full_like(leaf.grad[p], share), atol=1e-6)


def test_only_what_belongs_together_is_joined(network, pool):
    other = random_backbone(dataclasses.replace(ARCH, depth=1))
    with pytest.raises(ValueError, match=r"blocks\.1\..*architecture"):
        Pool.concat([pool, pretrained_pool(other.weights, [ORDINARY])])
    for kind, norms in (("lora", False), (r"lora\+norm", True)):
        with pytest.raises(ValueError, match=f"--tune full, another with {kind}"):
            Pool.concat([pool, principal_pool(network.weights, 2, [ORDINARY], norms=norms)])


def test_both_kinds_say_what_they_merge_to(network, pool):
    loras = principal_pool(network.weights, 2, [ORDINARY])
    shapes = {name: tuple(weight.shape) for name, weight in network.weights.items()}
    assert loras.shapes == pool.shapes == shapes
    assert pool.adapted == shapes.keys() and loras.adapted == {n for n in shapes if n.endswith("weight")} & {
        name.removesuffix(".lora_A") for name in loras.factors
    }
    assert (loras.rank, pool.rank, loras.tune, pool.tune) == (2, None, "lora", "full")


# --- training --------------------------------------------------------------------------------------------


def test_plain_full_tuning_is_torchs_own_training(network):
    """P>M>F's meta-training, three steps with momentum, against a module and torch's optimiser."""
    plain = Plain(network)
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    tuner = tuner_of(network, pretrained_pool(network.weights, [ORDINARY]), "standard")
    for seed in range(3):
        episode = patterned_episode(seed, side=16)
        loss = F.cross_entropy(
            plain(episode.support, episode.support_labels, episode.query), episode.query_labels
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        (record,) = tuner.step(episode)
        assert record.total == record.natural == pytest.approx(loss.item(), rel=1e-5)
        assert record.clean_accuracy == record.robust_accuracy and record.robust == 0
    assert close(tuner.pool.merge((1.0,)), plain.weights()) == []
    assert tuner.pool.scale.item() == pytest.approx(plain.scale.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["standard", "querying", "adsv"])
def test_full_tuning_trains_every_weight_of_every_member(network, episode, method):
    """Position table, class token, norms and biases, and the scale; under weight perturbation as well."""
    levels = (DUAL, dataclasses.replace(DUAL, epsilon=1.0)) if method == "adsv" else (ORDINARY,)
    tuner = tuner_of(network, pretrained_pool(network.weights, levels), method)
    before = {name: weight.clone() for name, weight in network.weights.items()}
    for _ in range(2):  # the first step of a norm's weight of 1 or a bias of 0 may come to nothing
        records = tuner.step(episode)
    assert len(records) == len(levels) and all(record.total > 0 for record in records)
    for p in range(len(levels)):
        trained = tuner.pool[p].merge((1.0,))
        assert [name for name in trained if torch.equal(trained[name], before[name])] == []
        assert tuner.pool.scale[p] != 10 and tuner.pool.bias[p] == 0
    assert identical(network.weights, before)


def attacked_by_hand(plain: Plain, episode: Episode, level: Perturbation, start: Tensor) -> Tensor:
    """PGD on the queries by the letter: signed steps on the cross-entropy, projected, within [0, 1]."""
    delta = start.clone()
    for _ in range(level.steps):
        delta.requires_grad_()
        logits = plain(episode.support, episode.support_labels, (episode.query + delta).clamp(0, 1))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, episode.query_labels), delta)
        delta = (delta.detach() + level.step_size / 255 * gradient.sign()).clamp(
            -level.epsilon / 255, level.epsilon / 255
        )
    return (episode.query + delta).clamp(0, 1).detach()


def test_adversarial_querying_is_torchs_own_training_on_attacked_queries(network):
    episode = patterned_episode(5, side=16)
    inner = 0.1 + 0.8 * episode.query  # away from the limits, where clipping counts half a gradient
    episode = dataclasses.replace(episode, query=inner)
    (start,) = ORDINARY.pyramid.start(inner, torch.Generator().manual_seed(1))
    plain = Plain(network)
    images = attacked_by_hand(plain, episode, ORDINARY, start)
    assert 0 < (images - inner).abs().max() <= 8 / 255 + 1e-6
    logits = plain(episode.support, episode.support_labels, images)
    loss = F.cross_entropy(logits, episode.query_labels)
    loss.backward()

    leaf = trainable(pretrained_pool(network.weights, [ORDINARY]))
    outcome = querying_outcome(network, leaf, episode, [start])
    outcome.loss.total.sum().backward()
    assert torch.allclose(outcome.attacked[0], logits, atol=1e-4)
    clean = plain(episode.support, episode.support_labels, inner)
    assert torch.allclose(outcome.clean[0], clean, atol=1e-4) and not outcome.clean.requires_grad
    assert outcome.loss.total.item() == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: weight.grad for name, weight in plain.network.named_parameters()}
    found = {name: factor.grad[0] for name, factor in leaf.factors.items()}
    assert close(found, expected, atol=1e-5) == []


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_querying_shows_the_support_set_clean_and_perturbs_no_weight(network, episode, tune):
    """One pass of the support, K + 2 of the queries, and nothing that gamma or beta could change."""
    start = untrained(network, tune, ORDINARY)
    seen = []

    def look(_, images):
        seen.append(images[0])

    handle = network.module.register_forward_pre_hook(look)
    try:
        tuners = [
            tuner_of(network, dataclasses.replace(start, levels=(level,)), "querying")
            for level in (ORDINARY, dataclasses.replace(ORDINARY, gamma=0.5, beta=3.0))
        ]
        for tuner in tuners:
            tuner.step(episode)
    finally:
        handle.remove()
    assert identical(tuners[0].pool.factors, tuners[1].pool.factors)
    one = seen[: len(seen) // 2]
    normalised = network.normalise(episode.support)
    assert torch.equal(one[0], normalised)
    assert len(one) == 1 + ORDINARY.steps + 2
    assert all(len(images) == len(episode.query) for images in one[1:])


def untrained(network: Network, tune: str, *levels: Perturbation) -> Pool:
    if tune == "full":
        return pretrained_pool(network.weights, levels)
    return principal_pool(network.weights, 3, levels)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_querying_without_room_is_plain_meta_tuning(network, episode, tune):
    nothing = dataclasses.replace(ORDINARY, epsilon=0.0, step_size=0.0)
    start = untrained(network, tune, nothing)
    (zero,) = nothing.pyramid.start(episode.query, torch.Generator())
    with torch.no_grad():
        plain = natural_outcome(network, start, episode)
    outcome = querying_outcome(network, start, episode, [zero])
    assert torch.allclose(outcome.loss.total, plain.loss.total, atol=1e-5)
    assert torch.allclose(outcome.attacked, outcome.clean, atol=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_loss_under_attack_falls_when_querying_trains(network, tune):
    """On the episode it is trained on, against the same start."""
    episode = patterned_episode(3, side=16)
    tuner = tuner_of(network, untrained(network, tune, ORDINARY), "querying", lr=0.02)

    def loss() -> float:
        start = ORDINARY.pyramid.start(episode.query, torch.Generator().manual_seed(0))
        return querying_outcome(network, tuner.pool, episode, start).loss.total.item()

    before = loss()
    for _ in range(15):
        tuner.step(episode)
    assert loss() < 0.7 * before


@pytest.mark.parametrize("method", ["standard", "querying", "adsv"])
def test_a_restored_full_run_goes_on_exactly(network, tmp_path, method):
    pool = pretrained_pool(network.weights, (DUAL, ORDINARY))
    plan = quick(lr=0.01, episodes_per_epoch=100, method=method)
    assert_goes_on_exactly(network, pool, plan, tmp_path)


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def file(pool, tmp_path) -> Path:
    path = tmp_path / "full.safetensors"
    checkpoint.save(path, Checkpoint(pool, {"arch": "tiny"}))
    return path


def test_a_file_of_loras_from_before_there_was_a_choice_is_read(network, tmp_path):
    path, loras = tmp_path / "old.safetensors", moved_apart(principal_pool(network.weights, 2, [DUAL]))
    checkpoint.save(path, Checkpoint(loras, {}))
    found = checkpoint.load(rewritten(path, lambda _, header: header.pop("tune"))).pool
    assert identical(found.factors, loras.factors) and identical(found.residual, loras.residual)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, h: h.update(tune="dora"), "damaged header.*dora"),
        (lambda t, h: h.update(tune=["full"]), "damaged header"),
        (lambda t, h: h.update(tune="lora"), "factors do not belong"),
        (lambda t, h: h.update(levels=[]), "damaged header.*0 levels"),
        (
            lambda t, h: t.update({"factors/norm.bias": torch.zeros(2, 24)}),
            r"factors/norm\.bias.*\(2, 24\).*3",
        ),
        (lambda t, h: t.update({"factors/norm.bias": torch.tensor(1.0)}), r"factors/norm\.bias.*\(\).*3"),
        (lambda t, h: t.update({"residual/norm.bias": torch.zeros(24)}), "no complete weights"),
        (lambda t, h: [t.pop(n) for n in list(t) if n.startswith("factors")], "no complete weights"),
        (lambda t, h: t.pop("head/scale"), "head/scale"),
        (lambda t, h: t["factors/norm.bias"].fill_(float("inf")), "norm.bias.*not finite"),
        (lambda t, h: t.update({"factors/norm.bias": torch.zeros(3, 24, dtype=torch.int)}), "torch.int32"),
    ],
)
def test_a_damaged_file_of_a_full_pool_is_one_clear_line(file, change, words):
    fails(words, lambda: checkpoint.load(rewritten(file, change)))


def test_a_full_pool_of_another_network_is_refused(file, pool):
    other = random_backbone(dataclasses.replace(ARCH, mlp_ratio=3.0))
    fails(
        r"blocks\.0\.mlp\.fc1\.bias is \(48,\), but --arch big has it \(72,\)",
        lambda: checkpoint.check_architecture(file, pool, other.weights, "big"),
    )


def test_a_full_pool_is_described_assembled_and_exported(network, pool, file, tmp_path, capsys, monkeypatch):
    """By the commands that take a pool; what only LoRAs have a place in is refused in one line."""
    assert describing.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "our pool of complete networks" in said and "dim 24, depth 2, patch 4" in said
    one, out = tmp_path / "one.safetensors", tmp_path / "more.safetensors"
    checkpoint.save(one, Checkpoint(pool[1], {"arch": "tiny"}))
    assert pooling.main([str(one), str(file), "--out", str(out), "--epsilon", "1", "2", "4", "8"]) == 0
    assert "4 complete networks, epsilon 1, 2, 4, 8 (of 255)" in capsys.readouterr().out
    joined = checkpoint.load(out).pool
    assert identical(joined[0].whole, pool[1].whole) and identical(joined[3].whole, pool[2].whole)
    loras = tmp_path / "loras.safetensors"
    checkpoint.save(loras, Checkpoint(principal_pool(network.weights, 2, [DUAL]), {"arch": "tiny"}))
    fails(
        "full.safetensors and .*loras.safetensors: .*--tune full, another with lora",
        lambda: pooling.main([str(file), str(loras), "--out", str(out)]),
    )

    monkeypatch.setattr(exporting, "backbone_of", lambda *_: network)
    shares = ["--coefficients", "0.5", "0.25", "0.25"]
    net = tmp_path / "net.safetensors"
    assert exporting.main([str(file), "--to", "timm", *shares, "--out", str(net)]) == 0
    assert close(load_file(net), pool.merge([0.5, 0.25, 0.25])) == []
    for to in ("peft", "published"):
        words = [str(file), "--to", to, "--adapter", "0", "--out", str(tmp_path / to)]
        fails(f"full.safetensors holds complete networks, and --to {to}", lambda w=words: exporting.main(w))
        assert not (tmp_path / to).exists()
    for refused in (
        lambda: export.published_state(pool),
        lambda: export.peft_adapter(network, pool, [1, 0, 0]),
    ):
        fails("the pool holds complete networks", refused)
