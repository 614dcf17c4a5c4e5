"""Settings of the router and of test-time fine-tuning. Knows no tensors."""

import dataclasses

from meta_dataset_readers.settings import setting

AUGMENTATIONS = ("color", "translation")

# What --select searches by default.
BETAS = (0.1, 1.0, 10.0, 100.0)
GAMMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)

_SEVERAL = "; several values are for --select to choose from"


def _listed(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


@dataclasses.dataclass(frozen=True)
class Routing:
    """How support scores become merging coefficients.

    Args:
        beta, gamma, top_k: as in amt/tasks/merge.py.
        augment_probability: of the support images that are compared with the prototypes, where they are not
            attacked.
        epsilon: in 1/255 of the pixel range. Attacked images, for each adapter its own, are not augmented:
            0 is a rule of its own and not the limit of small values.
        steps: of that attack, each of epsilon / 4.

    >>> Routing(beta=10, epsilon=4).view
    (4, 5)
    """

    beta: float = setting(
        1.0,
        f"sharpness of the scores{_SEVERAL} (default: 1, or with --select {_listed(BETAS)})",
        flag="blend_beta",
        least=0,
        most=10**6,
        metavar="BETA",
    )
    gamma: float = setting(
        0.6,
        f"balance of intra and inter{_SEVERAL} (default: 0.6, or with --select {_listed(GAMMAS)})",
        flag="blend_gamma",
        least=0,
        most=10**6,
        metavar="GAMMA",
    )
    top_k: int = setting(2, f"adapters that share the weight{_SEVERAL} (default: 2)", least=1, metavar="K")
    augment_probability: float = setting(
        0.9, "chance of augmenting the support", flag="aug_prob", least=0, most=1
    )
    epsilon: float = setting(
        0.0,
        "from clean to robust: score the adapters on support images attacked within E/255; 0: the published "
        f"scores, on clean ones{_SEVERAL} (default: 0; ours)",
        flag="route_epsilon",
        least=0,
        most=10**6,
        metavar="E",
    )
    steps: int = 5

    @property
    def view(self) -> tuple[float, float]:
        """What decides which images are scored: equal views have equal cosines."""
        return (self.epsilon, self.steps) if self.epsilon > 0 else (0.0, self.augment_probability)


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """How a network is fine-tuned on a task's support set: by Adam with its usual momenta 0.9 and 0.999 and
    no weight decay, as published. A rate of 0 leaves the weights as they are.
    """

    steps: int = setting(
        100,
        "steps of Adam; 100 is the published example's, 50 and 40 are elsewhere in that code",
        flag="ada_steps",
        least=0,
        most=10**6,
    )
    lr: float = setting(
        1e-4,
        "its rate, which matters most: 0.0001 in the published example; its authors choose by domain among "
        "0, 0.0001, 0.001 and 0.01 on labelled episodes",
        flag="ada_lr",
        least=0,
        most=1000,
    )
    augment_probability: float = setting(0.9, flag="aug_prob")
    augment_kinds: tuple[str, ...] = setting(
        AUGMENTATIONS,
        "how the support is augmented for it, with the chance --aug_prob (as published)",
        flag="aug_types",
        choices=AUGMENTATIONS,
    )
