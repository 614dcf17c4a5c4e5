"""Heads: what classifies the features of a task, fitted to its support set; without state of their own.

    fitted = fit(head, features, labels)      (S, D), (S,)  ->  a function
    fitted(features)                          (Q, D)        ->  logits (Q, N)

With class means mu_c of the support, m the mean of these, and a covariance S:

    prototypes    scale (cos(f, mu_c) + bias)                    (Snell et al. 2017; Hu et al. 2022)
    centred       scale (cos(f - m, mu_c - m) + bias)
    lda           mu_c^T S^-1 f - 1/2 mu_c^T S^-1 mu_c,   S = a S_support + d I
    robust-lda    the same,                S = a S_support + b S_source + c S_attack + d I
    ridge         w_c^T f + w_c0, the least squares of one-hot labels in closed form (Bertinetto et al. 2019)

Every covariance is divided by its mean variance, trace / D, before they are mixed. Where no class has two
images, that over augmented views of the images takes the place of S_support (share e), or nothing does.
Linear heads are multiplied by one number, so that their logits have a given spread on the support: no softmax
saturates, and no prediction depends on it. docs/explanation/robust-lda.md derives robust-lda.

Everything is differentiable through support and query. Knows no network and no image.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.models.head_settings import COSINE, COVARIANCE, Head

SPREAD = 10.0  # of the logits on the support, where nothing else is asked for
_TINY = 1e-12


def prototypes(features: Tensor, labels: Tensor) -> Tensor:
    """Mean of the raw features of each class: (S, D) float and (S,) int64 in 0..N-1 -> (N, D).

    N is the largest label plus one; every class has an image.
    """
    member = F.one_hot(labels).to(features.dtype)
    return member.T @ features / member.sum(0)[:, None]


def index_in_class(labels: Tensor) -> Tensor:
    """Number each image within its class, from 0, in the given order: (S,) int64 -> (S,) int64."""
    return F.one_hot(labels).cumsum(0).gather(1, labels[:, None]).squeeze(1) - 1


def cosine_logits(
    features: Tensor, prototypes: Tensor, scale: Tensor | float = 1.0, bias: Tensor | float = 0.0
) -> Tensor:
    """scale * (cos(feature, prototype) + bias): (..., Q, D) and (..., N, D) -> (..., Q, N)."""
    cosines = F.normalize(features, dim=-1, eps=1e-12) @ F.normalize(prototypes, dim=-1, eps=1e-12).mT
    return scale * (cosines + bias)


# --- fitted heads ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cosine:
    """scale * (cos(feature - origin, centre) + bias).

    Args:
        centres: (N, D), or (P, N, D) of P networks.
        scale, bias: of the logits; of P networks (P, 1, 1).
        origin: (D,), of P networks (P, 1, D), or None for zero.
    """

    centres: Tensor
    scale: Tensor | float = 1.0
    bias: Tensor | float = 0.0
    origin: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Logits: (..., Q, D) -> (..., Q, N)."""
        moved = features if self.origin is None else features - self.origin
        return cosine_logits(moved, self.centres, self.scale, self.bias)


@dataclasses.dataclass(frozen=True)
class Linear:
    """weight feature + bias, of (N, D) and (N,), or (P, N, D) and (P, 1, N) of P networks."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits: (..., Q, D) -> (..., Q, N)."""
        return features @ self.weight.mT + self.bias


@dataclasses.dataclass(frozen=True)
class WithTexts:
    """The logits of a support's head, and those of the texts of the classes, added."""

    own: "Fitted"
    texts: "Fitted"

    def __call__(self, features: Tensor) -> Tensor:
        """Logits: (Q, D) -> (Q, N)."""
        return self.own(features) + self.texts(features)


Fitted = Cosine | Linear | WithTexts


def mapped(fitted: Fitted, change: Callable[[Tensor], Tensor]) -> Fitted:
    """The same head with every one of its tensors, of any shape, changed, in the order of its fields."""
    parts = {
        name: change(value) if isinstance(value, Tensor) else mapped(value, change)
        for name, value in vars(fitted).items()
        if isinstance(value, Tensor | Cosine | Linear)
    }
    return dataclasses.replace(fitted, **parts)


def detached(fitted: Fitted) -> Fitted:
    """The same head, of any shape, without graph."""
    return mapped(fitted, Tensor.detach)


def scaled(fitted: Fitted, factor: Tensor | float) -> Fitted:
    """The head whose logits are `factor` times as large; `factor` is a scalar."""
    if isinstance(fitted, WithTexts):
        return WithTexts(scaled(fitted.own, factor), scaled(fitted.texts, factor))
    if isinstance(fitted, Cosine):
        return dataclasses.replace(fitted, scale=factor * fitted.scale)
    return Linear(factor * fitted.weight, factor * fitted.bias)


def stacked(heads: Sequence[Fitted]) -> Fitted:
    """The heads of P networks as one, from features (P, Q, D) to logits (P, Q, N); of one kind."""
    held = {name: value for name, value in vars(heads[0]).items() if isinstance(value, Tensor)}
    rows = {name: torch.stack([torch.atleast_2d(getattr(head, name)) for head in heads]) for name in held}
    return dataclasses.replace(heads[0], **rows)


def spread(logits: Tensor) -> Tensor:
    """Root mean square of logits (n, N) without each row's mean, which no prediction depends on: a scalar."""
    return (logits - logits.mean(1, keepdim=True)).square().mean().clamp(min=_TINY**2).sqrt()


# --- statistics of the features that a head may know besides the support ---------------------------------


class Statistics(NamedTuple):
    """Covariances under one network's weights, float32.

    Args:
        source: (D, D), within the classes of the meta-training source.
        attack: (D, D), second moment of the displacement of features under attack.
    """

    source: Tensor
    attack: Tensor


@dataclasses.dataclass(frozen=True)
class PoolStatistics:
    """`Statistics` of every member of a pool, and of the pretrained network.

    Args:
        source, attack: (P, D, D).
        pretrained: of the pretrained network.
    """

    source: Tensor
    attack: Tensor
    pretrained: Statistics

    def merged(self, coefficients: Sequence[float]) -> Statistics:
        """The members' matrices averaged by P coefficients, as an approximation to those of the merged
        network; without coefficients those of the pretrained network. Two matrices (D, D)."""
        if not coefficients:
            return self.pretrained
        shares = self.source.new_tensor([float(c) for c in coefficients])
        return Statistics(*(torch.einsum("p,pij->ij", shares, each) for each in (self.source, self.attack)))

    def averaged(self) -> "PoolStatistics":
        """A single member with the means over all, for the soup of a pool: (1, D, D) each."""
        return dataclasses.replace(
            self, source=self.source.mean(0, keepdim=True), attack=self.attack.mean(0, keepdim=True)
        )

    def to(self, device: torch.device | str) -> "PoolStatistics":
        """The same tensors on `device`: (P, D, D) and (D, D)."""
        pretrained = Statistics(*(each.to(device) for each in self.pretrained))
        return PoolStatistics(self.source.to(device), self.attack.to(device), pretrained)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a file keeps, by name: `triangles` (R, 2, D (D + 1) / 2) float16 and `units` (R, 2)
        float32. The R = P + 1 rows are of the members and of the pretrained network, each of source and
        attack.

        A unit is a power of two, so that half precision holds the largest number of every matrix: estimates
        from some tens of episodes have fewer digits than that.
        """
        pairs = [*zip(self.source, self.attack, strict=True), tuple(self.pretrained)]
        matrices = torch.stack([torch.stack(pair) for pair in pairs]).float()
        rows, columns = torch.triu_indices(*matrices.shape[-2:])
        largest = matrices.abs().amax((-2, -1))
        _, exponents = torch.frexp(largest * (1 + 2**-12))  # of the next power of two if it rounds up to it
        units = torch.ldexp(torch.ones_like(matrices[..., 0, 0]), exponents - 15)
        return {"triangles": (matrices[..., rows, columns] / units[..., None]).half(), "units": units}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], members: int) -> "PoolStatistics":
        """The inverse of `tensors`. Older files hold `source` and `attack` (P, D, D), `pretrained_source` and
        `pretrained_attack` (D, D), which are taken as they are.

        Raises:
            ValueError: a name or a shape is wrong for so many members.
        """
        if tensors.keys() == {"triangles", "units"}:
            return cls._unpacked(tensors["triangles"], tensors["units"], members)
        names = ("source", "attack", "pretrained_source", "pretrained_attack")
        if tensors.keys() != set(names):
            raise ValueError(f"found {', '.join(sorted(tensors))}, expected triangles, units")
        dim = tensors["source"].shape[-1] if tensors["source"].ndim else 0
        for name in names:
            expected = (dim, dim) if name.startswith("pretrained_") else (members, dim, dim)
            if tuple(tensors[name].shape) != expected or dim == 0:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {expected}")
        pretrained = Statistics(tensors["pretrained_source"], tensors["pretrained_attack"])
        return cls(tensors["source"], tensors["attack"], pretrained)

    @classmethod
    def _unpacked(cls, triangles: Tensor, units: Tensor, members: int) -> "PoolStatistics":
        """From triangles (P + 1, 2, T) and units (P + 1, 2)."""
        numbers = triangles.shape[-1] if triangles.ndim else 0
        dim = (math.isqrt(8 * numbers + 1) - 1) // 2
        kinds = (members + 1, 2)
        if dim == 0 or tuple(triangles.shape) != (*kinds, dim * (dim + 1) // 2):
            raise ValueError(
                f"triangles has shape {tuple(triangles.shape)}, expected {(*kinds, 'D (D + 1) / 2')}"
            )
        if tuple(units.shape) != kinds:
            raise ValueError(f"units has shape {tuple(units.shape)}, expected {kinds}")
        rows, columns = torch.triu_indices(dim, dim)
        matrices = units.new_empty(*kinds, dim, dim)
        matrices[..., rows, columns] = matrices[..., columns, rows] = triangles.float() * units[..., None]
        source, attack = matrices.unbind(1)
        return cls(source[:-1], attack[:-1], Statistics(source[-1], attack[-1]))

    @staticmethod
    def concat(parts: Sequence["PoolStatistics"]) -> "PoolStatistics":
        """Those of all members (P, D, D), in order; of the pretrained network those of the first part."""
        found = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("source", "attack")}
        return dataclasses.replace(parts[0], **found)


def within_class(features: Tensor, labels: Tensor) -> Tensor:
    """Scatter within classes: (n, D), (n,) -> (D, D), the sum of (f - mu_c)(f - mu_c)^T, with graph."""
    residuals = features - prototypes(features, labels)[labels]
    return residuals.T @ residuals


def unit(covariance: Tensor) -> Tensor:
    """A covariance (D, D) divided by its mean variance, trace / D; zero stays zero."""
    return covariance / (covariance.trace() / len(covariance)).clamp(min=_TINY)


def has_two(labels: Tensor) -> bool:
    """Whether any class has two images: (S,) int64."""
    return bool((labels.bincount() > 1).any())


# --- fitting ---------------------------------------------------------------------------------------------


def fit(
    head: Head,
    features: Tensor,
    labels: Tensor,
    statistics: Statistics | None = None,
    scale: Tensor | float = SPREAD,
    bias: Tensor | float = 0.0,
    views: Tensor | None = None,
) -> Fitted:
    """Fit a head to a support set. Mixing of two networks is the caller's: here one network is classified.

    Args:
        head: which, and its options.
        features: (S, D) of the support images.
        labels: (S,) int64 in 0..N-1; every class has an image.
        statistics: of the network; needed for shares of `source` and `attack` above 0.
        scale: of the cosines; of linear heads the spread of the logits on the support.
        bias: of the cosines.
        views: (V, S, D), features of V augmented views of each image; used if no class has two images.

    Raises:
        ValueError: the head needs statistics and there are none.
    """
    centres = prototypes(features, labels)
    if head.kind == "prototypes":
        return Cosine(centres, scale, bias)
    if head.kind in COSINE:
        origin = centres.mean(0)
        return Cosine(centres - origin, scale, bias, origin)
    size = _power_of_two(features)
    features, views = features / size, None if views is None else views / size
    if head.kind in COVARIANCE:
        centres = (centres / size).double()
        found = _discriminant(centres, mixed_covariance(head, features, labels, statistics, views))
    else:
        found = _least_squares(features.double(), labels, head.penalty)
    found = Linear(found.weight.to(features.dtype), found.bias.to(features.dtype))
    factor = scale / spread(found(features))
    return Linear(factor * found.weight / size, factor * found.bias)


def _power_of_two(features: Tensor) -> Tensor:
    """The scalar that brings the largest of these (S, D) to 1 or between 1 and 2: their squares neither
    overflow nor vanish, and no digit is lost by it."""
    largest = features.detach().abs().amax().clamp(min=_TINY)
    return largest / (2 * torch.frexp(largest).mantissa)


def mixed_covariance(
    head: Head,
    features: Tensor,
    labels: Tensor,
    statistics: Statistics | None = None,
    views: Tensor | None = None,
) -> Tensor:
    """S, float64 (D, D); arguments as of `fit`: features (S, D), views (V, S, D).

    Raises:
        ValueError: the head needs statistics and there are none.
    """
    if head.needs_statistics and statistics is None:
        raise ValueError(f"the head {head.name} needs statistics of the source")
    features = features.double()
    parts = [(head.identity, torch.eye(features.shape[1], dtype=features.dtype, device=features.device))]
    if has_two(labels):
        parts.append((head.support, within_class(features, labels)))
    elif views is not None:
        moves = views.double() - views.double().mean(0)
        moves = moves.flatten(0, 1)
        parts.append((head.views, moves.T @ moves))
    if statistics is not None:
        parts += [(head.source, statistics.source.double()), (head.attack, statistics.attack.double())]
    found = [share * unit(each) for share, each in parts if share > 0]
    return torch.stack(found).sum(0)


def _discriminant(centres: Tensor, covariance: Tensor) -> Linear:
    """Linear discriminant of class means (N, D). The means' mean is taken off first, which moves all logits
    of an image alike and keeps digits. Of features that are no numbers it is none either."""
    origin = centres.mean(0)
    moved = centres - origin
    weight = torch.cholesky_solve(moved.T, torch.linalg.cholesky_ex(covariance).L).T
    return Linear(weight, -0.5 * (weight * moved).sum(1) - weight @ origin)


def _least_squares(features: Tensor, labels: Tensor, penalty: float) -> Linear:
    """Ridge regression of one-hot labels with an intercept that is not penalised: with X (S, D) and Y (S, N)
    centred, W = X^T (X X^T + lambda I)^-1 Y, or by Woodbury's identity (X^T X + lambda I)^-1 X^T Y, whichever
    is smaller."""
    targets = F.one_hot(labels).to(features.dtype)
    x_mean, y_mean = features.mean(0), targets.mean(0)
    x, y = features - x_mean, targets - y_mean
    weakest = (penalty * x.square().sum(1).mean()).clamp(min=_TINY)

    def solve(gram: Tensor, right: Tensor) -> Tensor:
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + weakest * identity, right)

    weight = solve(x @ x.T, y).T @ x if len(x) < x.shape[1] else solve(x.T @ x, x.T @ y).T
    # The means' mean is in all logits alike; taken off, images that nothing tells apart have logits of zero.
    return Linear(weight, y_mean - y_mean.mean() - weight @ x_mean)
