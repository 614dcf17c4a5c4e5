"""The same mathematics as `amt`, arranged as one would first write it; what the benchmark compares with.

    LoRA as layers beside frozen weights        y = x W_res^T + b + (x A^T) B^T at every forward
    attack                                      the clean logits are computed anew at every step
    weight perturbation                         in a deep copy of the model, stepped by an optimiser
    test-time merging                           a deep copy of the model per episode, its weights reloaded
                                                by load_state_dict for one adapter after another; trimmed
                                                anew for every episode

So a training step with K attack steps takes 2K + 4 query forwards. What is arithmetic rather than
arrangement (cosine logits, losses, the attack's step, the support's augmentation, the blend of the scores)
is imported from `amt`. Kinder to itself than the published code in two respects: q, k and v are adapted by
low-rank products instead of a materialised matrix, and adapters are merged once per episode and adapter.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.losses import kl_sum
from amt.attacks.perturb import ascend
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.vit import resize_positions
from amt.models.weights import Coefficients, truncate
from amt.tasks.merge import augment, blend, compactness
from amt.tasks.settings import Routing
from amt.training.losses import RobustLoss, robust_loss
from meta_dataset_readers.episode import Episode


class LoRALinear(nn.Module):
    """A frozen linear layer W_res, b with an adapter A (g, r, in), B (g, out / g, r) beside it."""

    def __init__(self, residual: Tensor, bias: Tensor, A: Tensor, B: Tensor):
        super().__init__()
        self.weight = nn.Parameter(residual.clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self.lora_A = nn.Parameter(A.clone())
        self.lora_B = nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        moves = [x @ a.T @ b.T for a, b in zip(self.lora_A, self.lora_B, strict=True)]
        move = moves[0] if len(moves) == 1 else torch.cat(moves, dim=-1)
        return F.linear(x, self.weight, self.bias) + move


class Baseline(nn.Module):
    """A ViT of its own: images (N, 3, H, W) in [0, 1] -> CLS features (N, D) float32."""

    def __init__(self, network: Network):
        super().__init__()
        self.vit = copy.deepcopy(network.module)
        self.autocast = network.autocast
        token = self.vit.cls_token
        self.register_buffer("mean", token.new_tensor(network.mean).view(3, 1, 1))
        self.register_buffer("std", token.new_tensor(network.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        vit, patch = self.vit, self.vit.patch_embed.patch_size[0]
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        images = images[..., : grid[0] * patch, : grid[1] * patch]
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            tokens = vit.patch_embed((images - self.mean) / self.std)
            tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            tokens = vit.blocks(tokens + resize_positions(vit.pos_embed, grid))
            return vit.norm(tokens)[:, 0].float()


class Learner(Baseline):
    """A network with one adapter beside every adapted layer and a cosine head, ready to be trained."""

    def __init__(self, network: Network, adapter: Pool):
        super().__init__(network)
        self.scale = nn.Parameter(adapter.scale.clone())
        self.register_buffer("offset", adapter.bias.clone())
        for name, A in adapter.A.items():
            where, _, layer = name.removesuffix(".weight").rpartition(".")
            parent = self.vit.get_submodule(where)
            bias = getattr(parent, layer).bias
            setattr(parent, layer, LoRALinear(adapter.residual[name], bias, A[0], adapter.B[name][0]))

    def logits(self, images: Tensor, centres: Tensor) -> Tensor:
        return cosine_logits(self(images), centres, self.scale, self.offset)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The factors and the head's scale, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def training_step(
    model: Learner,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    episode: Episode,
    level: Perturbation,
    start: list[Tensor],
) -> RobustLoss:
    """One step of adversarial meta-tuning, the attack's start given; the gradient stays in `.grad`."""
    query, labels = episode.query, episode.query_labels
    proxy = copy.deepcopy(model)
    centres = prototypes(model(episode.support), episode.support_labels)
    fixed_centres = centres.detach()

    def divergence(images: Tensor) -> Tensor:
        return kl_sum(model.logits(query, fixed_centres), model.logits(images, fixed_centres))

    images = ascend(divergence, query, start, level.pyramid, level.steps, scaler.get_scale())
    uphill = robust_loss(
        proxy.logits(query, fixed_centres), proxy.logits(images, fixed_centres), labels, level.beta
    )
    climb(model, proxy, uphill.total * scaler.get_scale(), level.gamma)

    # The support was seen at the model's own weights and the query at the proxy's: their gradients add up.
    loss = robust_loss(proxy.logits(query, centres), proxy.logits(images, centres), labels, level.beta)
    optimiser.zero_grad()
    scaler.scale(loss.total).backward()
    for own, moved in zip(model.trained.values(), proxy.trained.values(), strict=True):
        own.grad = moved.grad if own.grad is None else own.grad + moved.grad
    scaler.unscale_(optimiser)
    scaler.step(optimiser)
    scaler.update()
    return loss


def climb(model: Learner, proxy: Learner, loss: Tensor, radius: float) -> None:
    """Move the proxy's factors from the model's by `radius` times each one's norm, up the slope of `loss`.

    Args:
        model: stays as it is.
        proxy: its copy, whose graph `loss` belongs to; comes back moved and without gradients.
        radius: > 0, relative to the norm of each factor.
    """
    own = {name: factor for name, factor in model.trained.items() if name != "scale"}
    moved = {name: proxy.trained[name] for name in own}
    (-loss).backward()
    torch.optim.SGD(moved.values(), lr=radius).step()
    with torch.no_grad():
        for name, factor in own.items():
            direction = moved[name] - factor
            length = radius * factor.norm() / (direction.norm() + 1e-20)
            moved[name].copy_(factor + length * direction)
    proxy.zero_grad()


@dataclasses.dataclass(frozen=True)
class Classified:
    """What became of one episode: coefficients, clean logits (Q, N), and the share of images still right
    after the attack, or clean where there was none."""

    coefficients: Coefficients
    logits: Tensor
    accuracy: float


def evaluate_episode(
    model: Baseline,
    pool: Pool,
    episode: Episode,
    routing: Routing,
    generator: torch.Generator,
    attack: Attack | None,
    attack_generators: Sequence[torch.Generator],
    trims: Sequence[Trim] = (),
    fixed: Coefficients | None = None,
) -> Classified:
    """Score the adapters on the support, merge, trim, classify the query, and attack it if asked to.

    With `fixed` coefficients nothing is scored.
    """
    support, labels = episode.support, episode.support_labels
    merged = copy.deepcopy(model)
    coefficients = fixed or score(merged, pool, episode, routing, generator)
    with torch.no_grad():
        reload(merged, pool, coefficients)
        trim(merged, trims)
        scale, offset = pool.head(coefficients)
        centres = prototypes(merged(support), labels)
        logits = cosine_logits(merged(episode.query), centres, scale, offset)
    wrong = logits.argmax(1) != episode.query_labels
    if attack is not None:
        wrong |= pgd(
            lambda images: cosine_logits(merged(images), centres, scale, offset),
            episode.query,
            episode.query_labels,
            attack,
            attack_generators,
        )
    return Classified(coefficients, logits, 1 - wrong.float().mean().item())


@torch.no_grad()
def score(
    model: Baseline, pool: Pool, episode: Episode, routing: Routing, generator: torch.Generator
) -> Coefficients:
    """The coefficients that the support set decides, in float32; the model is left with other weights."""
    support, labels, autocast = episode.support, episode.support_labels, model.autocast
    model.autocast = None
    view = support
    if torch.rand((), generator=generator) < routing.augment_probability:
        view = augment((support - model.mean) / model.std, generator) * model.std + model.mean
    cosines = []
    for p in range(len(pool)):
        reload(model, pool, [float(p == other) for other in range(len(pool))])
        centres = prototypes(model(support), labels)
        cosines.append(cosine_logits(model(view), centres))
    model.autocast = autocast
    return blend(*compactness(torch.stack(cosines), labels), routing)


def trim(model: Baseline, trims: Sequence[Trim]) -> None:
    """Truncate the singular values of the selected weights, in place."""
    for which in trims:
        for name, weight in model.vit.named_parameters():
            if which.selects(name):
                weight.copy_(truncate(weight, which.keep))


def reload(model: Baseline, pool: Pool, coefficients: Coefficients) -> None:
    """Load the residual, then add every adapter's share to it, layer by layer."""
    model.vit.load_state_dict(pool.residual)
    for name in pool.A:
        weight = model.vit.get_parameter(name)
        for share, A, B in zip(coefficients, pool.A[name], pool.B[name], strict=True):
            if share:
                weight.add_((share * B @ A).reshape(weight.shape))


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """L-infinity PGD that works on every image at every step; which images it ever fooled, (Q,) bool."""
    (radius,) = attack.epsilons
    epsilon, step_size = radius / 255, attack.step_at(radius) / 255
    lower, upper = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    noise = torch.stack([torch.rand(images.shape[1:], generator=each) for each in generators]).to(images)
    delta = torch.minimum(torch.maximum(images + (2 * noise - 1) * epsilon, lower), upper) - images
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(attack.steps):
        delta = delta.detach().requires_grad_()
        logits = logits_of(images + delta)
        fooled |= logits.argmax(1) != labels
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), delta)
        moved = images + delta + step_size * gradient.sign()
        delta = torch.minimum(torch.maximum(moved, lower), upper) - images
    with torch.no_grad():
        return fooled | (logits_of(images + delta).argmax(1) != labels)
