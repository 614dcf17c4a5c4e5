"""Pools and trainings of a small network, written as the published code writes them."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from conftest import moved_apart
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.models.architectures import Arch
from amt.models.pool import Pool, principal_pool

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)
RANK = 3


def trained(network, adapters: int) -> Pool:
    """A pool whose LoRAs have moved apart, with a head of their own kind."""
    levels = tuple(Perturbation(8.0 / (p + 1), 2.0 / (p + 1)) for p in range(adapters))
    pool = moved_apart(principal_pool(network.weights, RANK, levels))
    return dataclasses.replace(pool, scale=torch.full((adapters,), 9.5), bias=torch.full((adapters,), 0.25))


def as_published(pool: Pool, single: bool = False) -> dict[str, Tensor]:
    """The state dict the published code would save of `pool`; of a training if it is `single`."""
    prefix = "backbone." if single else "backbone.model."
    state = {"bias": pool.bias[:1], "scale_cls": pool.scale[:1]}
    state |= {prefix + name: weight for name, weight in pool.residual.items()}
    for name in pool.A:
        layer = prefix + name.removesuffix(".weight")
        for p in range(len(pool)):
            k = "" if single else f".{p}"
            state[f"{layer}.lora_A{k}"] = pool.A[name][p].flatten(0, 1)
            state[f"{layer}.lora_B{k}"] = pool.B[name][p].flatten(0, 1)
    return {name: tensor.clone() for name, tensor in state.items()}


def training_file(path: Path, pool: Pool, **arguments) -> Path:
    """A training checkpoint as the published main.py writes it, numpy's numbers in its arguments included."""
    usual = {
        "arch": "dino_small_patch16_amt",
        "epsilon": 6,
        "alpha": 1.5,
        "attack_iters": 7,
        "beta": 5.0,
        "delta_init": "random",
        "pgd_method": "adsv",
        "min_log_weight": np.log(0.5),
        "base_sources": ["ilsvrc_2012"],
        "opt_betas": None,
    }
    content = {
        "model": as_published(pool, single=True),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [0.01], "t_initial": 2, "warmup_steps": [0.1]},
        "epoch": 4,
        "model_ema": None,
        "args": argparse.Namespace(**(usual | arguments)),
        "scalar": {},
    }
    torch.save(content, path)
    return path


def pool_file(path: Path, pool: Pool) -> Path:
    torch.save({"model": as_published(pool)}, path)
    return path


def same(one: Pool, other: Pool) -> bool:
    """Whether two pools hold the same numbers, bit for bit."""

    def tensors(pool: Pool) -> dict[str, Tensor]:
        return pool.residual | pool.factors | {"head/scale": pool.scale, "head/bias": pool.bias}

    mine, others = tensors(one), tensors(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
