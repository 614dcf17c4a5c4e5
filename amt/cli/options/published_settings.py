"""The published hyper-parameters of AutoLoRa and of vanilla fine-tuning, at 32 and 96 px, as a rule.

They were tuned on CIFAR-10, CIFAR-100 and STL-10 for each way of pretraining. At 224 px there is one setting
for all, which is not here. (Method, section 7.) Knows no flags and no tensors.
"""

from typing import NamedTuple


class PublishedSettings(NamedTuple):
    """How one mode is fine-tuned.

    Args:
        lr: first learning rate; with the automatic schedule the published code starts at 0.1 whatever it is.
        batch_size: images per step.
        epochs: length of the whole training.
        milestones: the rate is divided by ten after these epochs, without the automatic schedule.
    """

    lr: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]


_DATASETS = ("cifar10", "cifar100", "stl10")
_SIZES = (32, 96)

# Of the linear modes: learning rate and batch size by data set; STL-10 has others at 96 px.
_Rates = dict[str, tuple[float, int]]
_ACL: _Rates = {
    "cifar10": (0.01, 512),
    "cifar100": (0.05, 512),
    "stl10": (0.01, 128),
    "stl10 at 96": (0.1, 512),
}
_ONE_NORM = dict.fromkeys(_ACL, (0.01, 512))
_AIR = _ACL | {"cifar100": (0.1, 512)}
_AIR_ALF = _AIR | {"stl10 at 96": (0.1, 128)}
_LINEAR: dict[str, tuple[_Rates, _Rates]] = {  # SLF, ALF
    "acl": (_ACL, _ACL),
    "advcl": (_ONE_NORM, _ONE_NORM),
    "a-infonce": (_ONE_NORM, _ONE_NORM),
    "deacl": (_ONE_NORM, _ONE_NORM),
    "dynacl": (_ACL, _ACL),
    "dynacl++": (_ACL, _ACL),
    "dynacl-rcs": (_ACL, _ACL),
    "dynacl-air": (_AIR, _AIR_ALF),
    "dynacl-air++": (_AIR | {"cifar100": (0.09, 512), "stl10": (0.1, 128)}, _AIR_ALF | {"stl10": (0.1, 128)}),
}
_FULL = (0.1, 128)

# Elsewhere it is 50 epochs with the automatic schedule, and 25 without.
_EPOCHS = {("dynacl-air", "cifar10", "SLF"): 5, ("dynacl-air++", "cifar10", "ALF"): 4}
_EPOCHS |= {("acl", dataset, "AFF"): 100 for dataset in _DATASETS}


def published_settings(
    pretraining: str, dataset: str, image_size: int, mode: str, automatic: bool
) -> PublishedSettings | None:
    """The published setting of one mode, or None where none was published.

    Names are found however they are spelled: with - or _, in any case. The published programs were not so
    lenient: with automatic schedules DynACL_AIR and DynACL_AIR++, and without them DynACL-RCS, missed their
    entries and were fine-tuned by the fallback in all modes: a rate of 0.1, batches of 128, 50 or 25 epochs,
    milestones 15 and 20. What changes by the right entries: their linear modes have batches of 512 at most
    places, and rates and milestones of their own; with automatic schedules, DynACL_AIR on CIFAR-10 has 5
    epochs of SLF and DynACL_AIR++ 4 of ALF, as without them; DynACL_RCS at 96 px has milestones 10 and 20.
    A setting is that of a mode by itself; in the published mode ALL the epochs of one went on to the next.

    Args:
        pretraining: ACL, AdvCL, A-InfoNCE, DeACL, DynACL, DynACL++, DynACL_AIR, DynACL_AIR++ or DynACL_RCS.
        dataset: cifar10, cifar100 or stl10.
        image_size: 32 or 96 px; only STL-10 has entries of its own at 96.
        mode: "SLF", "ALF" or "AFF".
        automatic: the table of AutoLoRa, which has schedules; otherwise that of vanilla fine-tuning.
    """
    name = pretraining.replace("_", "-").lower()
    if name not in _LINEAR or dataset not in _DATASETS or image_size not in _SIZES:
        return None
    large = dataset == "stl10" and image_size == 96
    if mode == "AFF":
        lr, batch_size = _FULL
    else:
        lr, batch_size = _LINEAR[name][mode == "ALF"]["stl10 at 96" if large else dataset]
    epochs = _EPOCHS.get((name, dataset, mode), 50 if automatic else 25)
    return PublishedSettings(lr, batch_size, epochs, _milestones(name, mode, large))


def _milestones(name: str, mode: str, large: bool) -> tuple[int, int]:
    if mode != "AFF":
        return (15, 20) if name in ("advcl", "a-infonce", "deacl") else (10, 20)
    if name == "acl":
        return (40, 60)
    return (10, 20) if large and name in ("dynacl", "dynacl++", "dynacl-rcs") else (15, 20)
