"""The domains that papers on this subject evaluate on: one entry each, by published name.

Says what a complete copy holds and which of several protocols is meant. Does not read anything, and nothing
depends on an entry being here: any directory in a known layout is a domain (`layouts.open_source`).

Class counts are per TRAIN, VALID and TEST. Image counts are those of the published specifications for
Meta-Dataset, and those the benchmarks' papers state for the others; None where no figure could be checked.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Domain:
    """What is known about a published domain.

    Args:
        benchmark: the collection it is evaluated as part of.
        classes: how many in TRAIN, VALID and TEST.
        images: in all its splits together.
        protocol: which task, files and rules are meant where several exist.
        licence: a hint, not advice; the download page has the terms.
        directories: other names of its folder, as its archive unpacks.
    """

    benchmark: str
    classes: tuple[int, int, int]
    images: int | None
    protocol: str
    licence: str
    directories: tuple[str, ...] = ()


META_DATASET, BSCD, FINE_GRAINED, SMALL = "Meta-Dataset", "BSCD-FSL", "fine-grained", "small images"
_RESEARCH = "images of third parties, research use"

DOMAINS = {
    "ilsvrc_2012": Domain(
        META_DATASET,
        (712, 158, 130),
        1_280_764,
        "classes of an episode lie below one node of the WordNet graph, unless the ways are fixed; "
        "duplicates of Caltech and CUB images are left out",
        "on registration with ImageNet, research use, may not be passed on",
    ),
    "ilsvrc_2012_v2": Domain(
        META_DATASET,
        (1000, 0, 0),
        1_280_764,
        "all classes are for training; VALID and TEST are empty",
        "on registration with ImageNet, research use, may not be passed on",
    ),
    "omniglot": Domain(
        META_DATASET,
        (883, 81, 659),
        32_460,
        "classes of an episode share an alphabet (25, 5 and 20 of them), unless the ways are fixed; drawings "
        "are inverted",
        "MIT",
    ),
    "aircraft": Domain(
        META_DATASET, (70, 15, 15), 10_000, "cropped to the bounding boxes; the 100 variants", _RESEARCH
    ),
    "cu_birds": Domain(META_DATASET, (140, 30, 30), 11_788, "whole images of CUB-200-2011", _RESEARCH),
    "dtd": Domain(META_DATASET, (33, 7, 7), 5_640, "the 47 texture classes", _RESEARCH),
    "quickdraw": Domain(META_DATASET, (241, 52, 52), 50_426_266, "28 x 28 drawings", "CC BY 4.0"),
    "fungi": Domain(
        META_DATASET,
        (994, 200, 200),
        89_760,
        "FGVCx 2018; the smallest class has 6 images, so fixed shots need --min_examples_in_class",
        "for the competition and research",
    ),
    "vgg_flower": Domain(META_DATASET, (71, 15, 16), 8_189, "Flowers-102", _RESEARCH),
    "traffic_sign": Domain(
        META_DATASET,
        (0, 0, 43),
        39_209,
        "GTSRB, test only; old conversions keep 30 video frames in a row, but images are drawn at random",
        "research use",
    ),
    "mscoco": Domain(
        META_DATASET,
        (0, 40, 40),
        860_001,
        "crops to boxes enlarged 1.2 times; has VALID classes although papers use it for testing only",
        "annotations CC BY 4.0; images of third parties",
    ),
    "CropDisease": Domain(
        BSCD,
        (0, 0, 38),
        43_456,
        "dataset/train only, as the benchmark does",
        "see PlantVillage",
        ("CropDiseases",),
    ),
    "EuroSAT": Domain(BSCD, (0, 0, 10), 27_000, "the RGB version, folder 2750", "see the EuroSAT project"),
    "ISIC": Domain(BSCD, (0, 0, 7), 10_015, "ISIC 2018 Task 3, training images, 7 diagnoses", "CC BY-NC 4.0"),
    "ChestX": Domain(
        BSCD,
        (0, 0, 7),
        25_847,
        "NIH ChestX-ray8: images with exactly one of 7 findings (no Pneumonia, no No Finding)",
        "free use with attribution to the NIH Clinical Center",
    ),
    "cub": Domain(
        FINE_GRAINED, (100, 50, 50), 11_788, "FWT's filelists: class i by i mod 4, unlike cu_birds", _RESEARCH
    ),
    "car": Domain(
        FINE_GRAINED, (98, 49, 49), 8_144, "FWT's filelists over cars_train alone", _RESEARCH, ("cars",)
    ),
    "plantae": Domain(
        FINE_GRAINED,
        (100, 50, 50),
        None,
        "FWT's filelists: the 200 largest plant classes of iNaturalist, at most 600 images each; only the "
        "published lists or archive define it",
        "images of third parties, mostly CC BY-NC",
    ),
    "places": Domain(
        FINE_GRAINED,
        (183, 91, 91),
        73_000,
        "FWT's filelists: the first 200 files of each class of Places365",
        _RESEARCH,
    ),
    "cifar_fs": Domain(
        SMALL, (64, 16, 20), 60_000, "train, val and test folders", "as CIFAR-100", ("cifar-fs", "CIFAR-FS")
    ),
    "mini_imagenet": Domain(
        SMALL,
        (64, 16, 20),
        60_000,
        "train, val and test folders; train is the folder published as train_train",
        "as ImageNet",
        ("Mini-ImageNet", "mini-imagenet", "miniImageNet"),
    ),
}
