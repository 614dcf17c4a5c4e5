"""Less memory for the same gradients: passes in parts, blocks made again; and what an episode will need."""

import copy
import dataclasses
import weakref

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_pools import RANK, quick
from toy_training import command

from amt.attacks.levels import Perturbation
from amt.cli import memory, options
from amt.models import network as networks
from amt.models.architectures import Arch
from amt.models.network import Network
from amt.models.parts import with_blocks_made_again
from amt.models.pool import adapted_layers, pretrained_pool, principal_pool
from amt.training import meta_tune
from amt.training.memory import Plan, needed
from amt.training.tuner import Tuner
from meta_dataset_readers.protocol import EpisodeSampling

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = tuple(Perturbation(e, e / 4, steps=1, grids=(2, 4, 0)) for e in (8, 6, 0.1))
WIDE = Arch(patch_size=8, dim=96, depth=4, heads=3, pretrained_size=32, image_size=32)
LONG = Arch(patch_size=4, dim=48, depth=5, heads=3, pretrained_size=32, image_size=32)


def tuner_of(network: Network, tune: str, at_once: int | None = None, **changes) -> Tuner:
    if tune == "full":
        pool = pretrained_pool(network.weights, LEVELS)
    else:
        pool = principal_pool(network.weights, RANK, LEVELS)
    return Tuner(network, moved_apart(pool), quick(**changes), at_once)


def gradients(network: Network, tune: str, **changes) -> dict[str, Tensor]:
    """Those of a first step: what momentum is then."""
    tuner = tuner_of(network, tune, **changes)
    tuner.step(patterned_episode(0, n_way=3, shots=2, queries=3, side=16))
    return tuner.state()[0]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of two gradients of a tensor; of those beside which the tensor's is nothing, such
    as a bias's that no logit depends on, relative to the largest."""
    largest = max(float(each.norm()) for each in expected.values())
    return max(
        float((found[name] - each).norm() / max(each.norm(), 1e-2 * largest))
        for name, each in expected.items()
    )


class Live(TorchDispatchMode):
    """Counts bytes of the tensors that are made within, and still there: now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(found) if isinstance(x, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return found

    def gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


# The same gradients


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    ("method", "head"),
    [("adsv", None), ("adsv", "lda"), ("querying", "ridge"), ("standard", "centred"), ("standard", None)],
)
def test_parts_have_the_gradients_of_one_pass(network, tune, method, head, monkeypatch):
    """Those that reach the support through the head, and those of the weights' move, among them; of the same
    attacked images, as an attack's signs flip where a slope is zero up to rounding."""

    def started(_network, _levels, _weights, _loss_of, query: Tensor, start: list[Tensor], *_how) -> Tensor:
        return (query + start[-1].view(query.shape)).clamp(0, 1)

    attack = meta_tune.attacked_queries
    monkeypatch.setattr(meta_tune, "attacked_queries", started)
    expected = gradients(network, tune, method=method, head=head)
    passes = []
    for n in (2, 5):
        sparing = dataclasses.replace(network, micro_batch=n)
        handle = network.module.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
        found = gradients(sparing, tune, method=method, head=head)
        handle.remove()
        assert 0 < worst(found, expected) < 1e-5
        assert max(passes) == n * len(LEVELS)
        passes.clear()
    one_less = patterned_episode(0, n_way=3, shots=2, queries=2, side=16)
    fewer = tuner_of(network, tune, method=method, head=head)
    fewer.step(one_less)
    assert worst(fewer.state()[0], expected) > 1e-2
    if method != "standard":
        monkeypatch.setattr(meta_tune, "attacked_queries", attack)
        expected = gradients(network, tune, method=method, head=head)
        assert 0 < worst(gradients(sparing, tune, method=method, head=head), expected) < 1e-4


def of_timm(kind: str) -> Network:
    from timm.models import eva, vision_transformer

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            module = vision_transformer.VisionTransformer(**shape, dynamic_img_size=True, init_values=0.5)
        else:
            module = eva.Eva(**shape, dynamic_img_size=True, use_rot_pos_emb=True, swiglu_mlp=True)
    return Network(kind, module, 16)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("kind", ["ours", "vit", "eva"])
def test_blocks_made_again_give_the_same_bits(network, kind, tune):
    """With the weights of the pass, not the module's own, which it has back when the gradient comes."""
    network = network if kind == "ours" else of_timm(kind)
    expected = gradients(network, tune)
    sparing = dataclasses.replace(network, module=with_blocks_made_again(network.module))
    again = dataclasses.replace(sparing, module=copy.deepcopy(sparing.module))
    for each in (sparing, again):
        found = gradients(each, tune)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    with torch.no_grad():
        next(again.module.parameters()).add_(1)
    assert torch.equal(next(sparing.module.parameters()), next(network.module.parameters()))


# What an episode needs


def measured(network: Network, plan: Plan) -> int:
    """The most bytes that are there in the second step of training, when there is momentum."""
    module = with_blocks_made_again(network.module) if plan.grad_checkpointing else network.module
    network = dataclasses.replace(network, module=module, micro_batch=plan.micro_batch)
    episode = patterned_episode(0, 2, plan.support // 2, plan.query // 2, side=network.image_size)
    with Live() as live:
        here = dataclasses.replace(episode, support=episode.support.clone(), query=episode.query.clone())
        own = {name: weight.clone() for name, weight in network.weights.items()}
        tuner = tuner_of(network, plan.tune, plan.at_once, method=plan.method)
        tuner.step(here)
        live.most = live.now
        tuner.step(here)
    assert own
    return live.most


@pytest.mark.parametrize(
    ("arch", "plan"),
    [
        (LONG, Plan("adsv", "lora", 3, 3, 6, 12)),
        (LONG, Plan("adsv", "lora", 3, 3, 6, 12, micro_batch=3)),
        (WIDE, Plan("adsv", "lora", 3, 1, 12, 6, grad_checkpointing=True)),
        (WIDE, Plan("querying", "lora", 3, 3, 12, 6, micro_batch=6, grad_checkpointing=True)),
        (WIDE, Plan("adsv", "full", 3, 3, 12, 6, micro_batch=6)),
        (WIDE, Plan("standard", "full", 3, 3, 12, 6)),
    ],
    ids=lambda value: "" if isinstance(value, Arch) else f"{value.method}-{value.tune}",
)
def test_the_estimate_is_near_what_training_keeps(arch, plan):
    network = random_backbone(arch)
    found = measured(network, plan)
    assert found / 1.5 < needed(network, plan) < 1.5 * found, (found, needed(network, plan))


def test_fifty_ways_at_128_px_fit_into_8_gb():
    network, _ = networks.untrained("dino_small_patch16")
    plan = Plan("adsv", "lora", 4, 4, support=500, query=500)
    assert needed(network, plan) > 100 * 2**30
    assert needed(network, dataclasses.replace(plan, micro_batch=16)) < 8e9
    fits, words = memory.said(network, plan, 8 * 10**9)
    assert not fits and "--micro_batch 32" in words
    assert len(adapted_layers(network.weights)) == 48


@pytest.mark.parametrize(
    ("sampling", "classes", "expected"),
    [
        ({"num_ways": 5, "num_support": 1, "num_query": 10}, None, (5, 50)),
        ({"num_ways": 5, "num_support": (1, 7)}, 100, (35, 50)),
        ({}, None, (500, 500)),
        ({}, 20, (500, 200)),
        ({"max_support_size_contrib_per_class": 10}, 6, (60, 60)),
        ({"max_support_set_size": 3}, 6, (6, 60)),
    ],
)
def test_the_largest_episode(sampling, classes, expected):
    assert memory.largest_episode(EpisodeSampling(**sampling), classes) == expected


def test_ranks_need_memory_for_their_own_levels_alone(world, tmp_path):
    """Else what fits on each of four GPUs was refused, as if one had all four levels."""
    args = options.training_parser().parse([str(flag) for flag in world.train(tmp_path)])
    plans = [memory.plan_of(args, [], ranks) for ranks in (1, 2, 3)]
    assert [(plan.members, plan.at_once) for plan in plans] == [(2, 2), (1, 1), (1, 1)]


def test_an_episode_that_will_not_fit_is_refused_before_anything_is_made(world, tmp_path, monkeypatch):
    """With the flag that makes it fit, which then does."""
    monkeypatch.setattr(memory, "free", lambda _: 12 * 2**20)
    big = ("--num_support", 5, "--num_query", 5, "--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0)
    flags = world.train(tmp_path / "out", *big, "--statistics_episodes", 0)
    ended = command("main", *flags)
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert ended.err.count("\n") == 1 and "does not fit into the memory" in ended.err
    advice = ended.err.rpartition("; ")[2].partition(" needs")[0].split()
    assert advice[0] == "--micro_batch"
    assert command("main", *flags, *advice).code == 0
    monkeypatch.setattr(memory, "free", lambda _: 2**20)
    assert "no flag makes it fit" in command("main", *flags).err


def test_a_dry_run_says_what_an_episode_needs(world, tmp_path, monkeypatch):
    """On a CPU it is said; on a device that is known to be too small it is missing."""
    flags = world.train(tmp_path / "out", "--num_support", 5, "--num_query", 5, "--dry_run")
    ended = command("main", *flags)
    assert ended.code == 0 and "there: memory of cpu: about " in ended.out
    assert "25 support and 25 query images" in ended.out and "2 of 2 levels at once" in ended.out
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(networks, "find_device", lambda _: cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 2**20, 2**30))
    ended = command("main", *flags)
    assert ended.code == 2 and "missing: memory of cuda:0: about " in ended.out
    assert "--micro_batch" in ended.out
