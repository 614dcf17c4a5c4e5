"""The attacks of pyautoattack, made to draw the same random numbers for every image.

APGD and AutoAttack: Croce & Hein 2020, arxiv.org/abs/2003.01690. FAB: Croce & Hein 2020,
arxiv.org/abs/1907.02044. Square Attack: Andriushchenko et al. 2020, arxiv.org/abs/1912.00049.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor
from torch.overrides import TorchFunctionMode

from amt.attacks.kinds import DLR_WAYS, Attack, autoattack_parts, target_count
from amt.attacks.losses import margin

Logits = Callable[[Tensor], Tensor]


def library_attack(
    attack: Attack, epsilon: float, logits: Logits, images: Tensor, labels: Tensor, n_way: int, seed: int
) -> Tensor:
    """Images (Q, 3, H, W) attacked by "apgd", "autoattack", "fab" or "square" at one radius. Arguments and
    errors as of `attack_queries`.
    """
    common = {
        "norm": {"linf": "Linf", "l2": "L2"}[attack.norm],
        "eps": epsilon / 255,
        "seed": seed,
        "device": images.device,
    }
    # The library draws from torch's global generator, whose state is restored afterwards.
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _SameForEveryImage() as same:
        return _run(attack, same.spared(logits), images, labels, n_way, common)


class _SameForEveryImage(TorchFunctionMode):
    """While active, random numbers for n images (n, C, H, W) are those for one of them, n times.

    The library draws for all images that are left at once, so what it tried on one would otherwise depend on
    which of the others had fallen, and on the size of the batch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.rand, torch.randn) and isinstance(args[0], tuple | list) and len(args[0]) == 4:
            return function(args[0][1:], **(kwargs or {})).expand(args[0])
        return function(*args, **(kwargs or {}))

    def spared(self, logits: Logits) -> Logits:
        """The same network, run without this mode, which would slow down all its functions. Its logits are
        copies, since the library writes to them."""

        def call(images: Tensor) -> Tensor:
            self.__exit__(None, None, None)
            try:
                return logits(images).clone()
            finally:
                self.__enter__()

        return call


def _quiet() -> logging.Logger:
    """The library's logger without its warnings, which repeat what the caller's own checks find, and would
    break the progress bar."""
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.ERROR)
    return logger


class _Apgd(APGDAttack):
    """AutoPGD on one of the losses here, of which the library lacks the margin."""

    def dlr_loss(self, x, y):
        """The loss that the library calls "dlr": logits (n, N) and labels (n,) -> (n,)."""
        return margin(x, y) if x.shape[1] < DLR_WAYS else super().dlr_loss(x, y)


def _run(
    attack: Attack, logits: Logits, images: Tensor, labels: Tensor, n_way: int, common: dict[str, Any]
) -> Tensor:
    logger = _quiet()
    if attack.kind == "apgd":
        own = {"n_restarts": attack.restarts, "loss": attack.loss, "logger": logger}
        return _Apgd(logits, attack.budget, **own, **common).perturb(images, labels)
    if attack.kind == "square":
        return SquareAttack(logits, n_queries=attack.budget, **common).perturb(images, labels)
    if attack.kind == "fab":
        own = {"targeted": True, "n_target_classes": target_count("fab", n_way, attack.targets)}
        return FABAttack_PT(logits, n_iter=attack.budget, **own, **common).perturb(images, labels)
    parts, targets = autoattack_parts(n_way, attack.targets)
    # Its annotations ask for a Module and a list of literals; it only calls the one and compares the others.
    runner = AutoAttack(logits, version="custom", attacks=parts, **common)  # pyright: ignore[reportArgumentType]
    runner.apgd.n_restarts = runner.fab.n_restarts = 1
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = targets
    return runner.run_standard_evaluation(images, labels, batch_size=len(images))[0]
