"""How AutoLoRa fine-tunes: length, rates, method, and the attack of training. Knows no tensors."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from meta_dataset_readers.settings import positive_int, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from amt.attacks.perturb import Ball

MODES = ("SLF", "ALF", "AFF")
METHODS = ("autolora", "vanilla", "twins")


def _epochs(text: str) -> tuple[int, ...]:
    """Increasing epochs, separated by commas."""
    numbers = tuple(int(positive_int(part)) for part in text.split(","))
    if list(numbers) != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text} is not increasing")
    return numbers


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The attack of training or validation: projected ascent. Its flags' help says the rest.

    Args:
        epsilon, step_size: in 1/255 of the pixel range.
        start: of training, "gaussian", 0.001 times a standard normal; "uniform" in an L-infinity ball, where
            the first gradient is taken even outside of the pixel range; "uniform_valid" in the ball and the
            pixel range; "none", the images.
    """

    epsilon: float = setting(
        8.0, "in 1/255 of the pixel range; below 0.5 in its parts", aliases="-e", least=0, most=10**6
    )
    step_size: float = setting(
        2.0, "in the same unit (0.00784: 2/255)", aliases="--alpha -a", least=0, most=10**6
    )
    steps: int = setting(10, "attack steps", flag="num_steps_train", aliases="--k -k", least=1, most=10**6)
    start: str = "gaussian"
    norm: str = setting("linf", "norm", flag="perturbation_type", aliases="-p", choices=("linf", "l2"))

    @property
    def ball(self) -> "Ball":
        """The images that it may reach, in pixel units."""
        from amt.attacks.perturb import Ball  # brings torch, which --help need not wait for

        return Ball(self.norm, self.epsilon / 255, self.step_size / 255)

    def begin(self, images: "Tensor", generator: "torch.Generator") -> "Tensor":
        """Where the ascent from images (n, 3, S, S) in [0, 1] starts; the noise is drawn on the CPU."""
        from amt.attacks.perturb import gaussian_noise, uniform_noise

        if self.start == "none":
            return images
        if self.start == "uniform_valid":
            return self.ball.start(images, generator)
        if self.start == "gaussian":
            return images + gaussian_noise(images.shape, generator).to(images)
        return images + self.ball.epsilon * uniform_noise(images.shape, generator).to(images)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one mode is fine-tuned; plain values but for `adversary`. The flags' help says the rest.

    Args:
        mode: "SLF", "ALF" or "AFF".
        adversary: of training.
        auto_lr: reduce the rate and bring the best weights back by the validation accuracies; otherwise
            divide by ten after the epochs in `milestones`.
        auto_weights: weigh the loss by the accuracy on the training data; otherwise by `natural_share` and
            `scale`.
        natural_share: the fixed lambda_1.
        scale: the largest (or the fixed) weight of the divergence.
        dual_norms: clean images have a BatchNorm set of their own.
        high_resolution: the schedule for 224 px: windows of four epochs, an end at a rate under 1e-5, and
            weights of the loss that are set once per epoch.
        published: repeat the deviations of the published code: that accuracy without the branch (low
            resolution, one BatchNorm set); the branch in some blocks only; windows of 50 epochs for any
            number; at high resolution a divergence divided by the nominal batch size; with two BatchNorm sets
            the first image's shortcuts for all. Not repeated: choices on test data, and at high resolution
            an attack of validation that starts at the images.
        seed: decides order, augmentation and the attacks' starts.
    """

    mode: str = "AFF"
    method: str = setting("autolora", "how AFF is done", choices=METHODS)
    epochs: int = setting(50, "default: 50; high: 60", aliases="--max_epoch -m_e", least=1, most=10**6)
    batch_size: int = setting(128, "default: 128; linear modes by table", aliases="-b", least=1, most=10**6)
    lr: float = setting(
        0.1, "first rate (default: 0.1; high: 0.01)", aliases="--learning_rate -lr", least=0, most=1000
    )
    momentum: float = setting(0.9, "momentum of SGD", aliases="-m", least=0, most=1)
    weight_decay: float = setting(2e-4, "default: 2e-4; high: 1e-4", aliases="--wd -w", least=0, most=1000)
    adversary: Adversary = dataclasses.field(default_factory=Adversary)
    auto_lr: bool = True
    auto_weights: bool = True
    natural_share: float = setting(
        1.0,
        "without --auto_scalars: share of clean images in the cross-entropy (default: autolora 0.5, else 1)",
        flag="lambda1",
        least=0,
        most=1,
    )
    scale: float = setting(6.0, "largest weight of the divergence", least=0, most=10**6)
    divide: float = setting(2.0, "what a reduction divides the rate by", above=1, most=10**6)
    milestones: tuple[int, ...] = setting(
        (),
        "without the automatic schedule: divide by ten after these epochs, such as 15,20",
        flag="decreasing_lr",
        read=_epochs,
        nargs=None,
    )
    rank: int = setting(8, "rank of the low-rank branch", flag="r_nat", least=0, most=10**6)
    dual_norms: bool = False
    high_resolution: bool = False
    whole_passes: bool = setting(
        False,
        "weigh the loss by passes over the training set, as published, and not by the batches as they come, "
        "which costs nothing",
    )
    published: bool = setting(
        False, "repeat what the published code does otherwise than the paper (implies --whole_passes)"
    )
    twins_share: float = setting(
        0.3, "weight of the frozen half of TWINS", flag="twins_lambda", least=0, most=10**6
    )
    similarity_every: int = setting(
        0,
        "every N batches note the cosine between the natural and the adversarial gradient, per layer",
        flag="gradient_similarity",
        metavar="N",
        least=0,
    )
    seed: int = 0

    @property
    def branch(self) -> bool:
        """Whether a low-rank branch is trained."""
        return self.mode == "AFF" and self.method == "autolora"

    @property
    def weighs(self) -> bool:
        """Whether the weights of the loss are scheduled."""
        return self.mode == "AFF" and self.auto_weights
