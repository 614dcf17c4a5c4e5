"""Pretrain the small backbone that the project ships, on the training classes of mini_objects alone.

    python -m meta_dataset_readers.mini --out data/pretrain --sources mini_objects --objects_per_class 400
    python -m studies.pretrain_vit_mini --data_path data/pretrain

Supervised, with four linear heads at once: the class, and the shape, texture and palette it is composed
of. A class head alone hardly starts to learn at this size. Every other domain stays unseen, and so do the
VALID and TEST classes of mini_objects. The result and its score are described in checkpoints/README.md.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from amt.files.pretrained import CHECKPOINTS
from amt.models.architectures import ARCHS, build_network
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.mini.objects import object_attributes
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.store import RecordStore

STORED_SIDE = 44  # images are kept a little larger than the network's 32 px, to crop from


def load_images(directory: Path) -> tuple[Tensor, Tensor, list[int]]:
    """All TRAIN images (M, 3, 44, 44) uint8, their labels (M, 4) int64, and the size of each of the heads."""
    spec, store = load_spec(directory), RecordStore(directory, directory.name)
    classes = spec.classes("TRAIN")
    words = [(str(k), *object_attributes(spec.class_name(k))) for k in classes]
    values = [sorted(set(column)) for column in zip(*words, strict=True)]
    images, labels = [], []
    for class_id, described in zip(tqdm(classes, desc="reading"), words, strict=True):
        label = [known.index(value) for known, value in zip(values, described, strict=True)]
        for index in range(store.count(class_id)):
            picture = store.image(class_id, index)
            images.append(
                pil_to_tensor(picture.resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BILINEAR))
            )
            labels.append(label)
    return torch.stack(images), torch.tensor(labels), [len(known) for known in values]


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random crop, scale, rotation, flip, colour order, brightness, contrast and inversion, per image.

    (M, 3, S, S) uint8 -> (M, 3, size, size) float32 in [0, 1].
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, zoom = uniform(-0.35, 0.35), uniform(0.65, 1.05)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([cos * flip, -sin, uniform(-0.15, 0.15), sin * flip, cos, uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(matrix.view(n, 2, 3), [n, 3, size, size], align_corners=False)
    out = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = uniform(0.5, 1.4).view(n, 1, 1, 1), uniform(-0.2, 0.2).view(n, 1, 1, 1)
    mean = out.mean((1, 2, 3), keepdim=True)
    out = ((out - mean) * contrast + mean + brightness).clamp(0, 1)
    inverted = (uniform(0, 1) < 0.25).view(n, 1, 1, 1)
    out = torch.where(inverted, 1 - out, out)
    grey = (uniform(0, 1) < 0.2).view(n, 1, 1, 1)
    return torch.where(grey, out.mean(1, keepdim=True), out)


def pretrain(
    images: Tensor, labels: Tensor, heads: list[int], steps: int, batch: int, seed: int
) -> nn.Module:
    """Train `vit_mini` from scratch; AdamW, 1.5e-3, linear warm-up and cosine."""
    torch.manual_seed(seed)
    arch = ARCHS["vit_mini"]
    network = build_network(arch).requires_grad_(True).train()
    classifier = nn.Linear(arch.dim, sum(heads))
    parameters = [*network.parameters(), *classifier.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.05)
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.tensor(arch.mean).view(3, 1, 1), torch.tensor(arch.std).view(3, 1, 1)
    progress = tqdm(range(steps), desc="pretraining")
    for _ in progress:
        chosen = torch.randint(len(images), (batch,), generator=generator)
        pixels = augment(images[chosen], arch.image_size, generator)
        parts = classifier(network((pixels - mean) / std)).split(heads, dim=1)
        losses = [
            F.cross_entropy(part, labels[chosen, head], label_smoothing=0.1)
            for head, part in enumerate(parts)
        ]
        optimiser.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix_str(" ".join(f"{loss.item():.2f}" for loss in losses), refresh=False)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder that holds mini_objects")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS / "vit_mini.safetensors")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, labels, heads = load_images(args.data_path / "mini_objects")
    network = pretrain(images, labels, heads, args.steps, args.batch, args.seed)
    replace_file(args.out, save(network.state_dict()))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
