"""What a support set says of a head that it was fitted to: logits of held-out images, and how sure they are.

    probabilities = softmax(logits / t)

A head's logits rank classes; their size is a convention (of linear heads a fixed spread), so a softmax of
them is no probability. One temperature for a task mends that (Guo et al. 2017, arxiv.org/abs/1706.04599),
here from its support set alone:

    t = argmin  sum_i cross-entropy(z_i / t, y_i) + log(t / t_0)^2,        t_0 = spread / 2

z_i are the logits of support image i by a head that was fitted without it. The second term is a prior that
weighs about as much as one image: by t_0 the logits on the support have the spread 2. It alone decides where
no class has two images. Both constants were chosen on VALID episodes of mini_objects, docs/explanation/
robust-lda.md. t_0 stays above the rounding of logits, or classes with the same images would give answers that
are certain. Uses no query, moves no prediction; attacks and accuracies do not see it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.models.heads import index_in_class, spread

PARTS = 10  # of larger support sets, into which they are divided to be held out
PRIOR_SPREAD = 2.0  # of the logits on the support divided by t_0
ROUNDING = 1e-5  # of logits in float32, relative to 1 or to the largest: a hundred times its last digit
_TRIED = torch.logspace(-2, 2, 161, dtype=torch.float64)  # multiples of t_0

Logits = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor], Logits]


def held_out(features: Tensor, labels: Tensor, fit: Fit) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits of images that a head was not fitted to, their features, and their labels, part by part.

    The k-th image of every class is classified by a head that is fitted to the others, for each k, or for
    each of 10 parts. The only image of a class is never left out.

    Args:
        features: (S, D) of the support.
        labels: (S,) int64 in 0..N-1.
        fit: features and labels of some support images, of all classes -> their head.
    """
    known = labels.cpu()  # once, so that nothing below waits for the device
    places, counts = index_in_class(known), known.bincount()
    for part in range(min(PARTS, int(counts.max()))):
        out = (places % PARTS == part) & (counts[known] > 1)
        if out.any():
            left, kept = (which.nonzero().squeeze(1).to(labels.device) for which in (out, ~out))
            yield fit(features[kept], labels[kept])(features[left]), features[left], labels[left]


def temperature(on_support: Tensor, features: Tensor, labels: Tensor, fit: Fit) -> float:
    """What the logits of a task are divided by before their softmax: t of the module's docstring.

    Args:
        on_support: (S, N) logits of the support by the head that was fitted to all of it.
        features, labels, fit: as of `held_out`; (S, D) and (S,).
    """
    parts = [(logits, true) for logits, _, true in held_out(features, labels, fit)]
    rounding = ROUNDING * on_support.abs().max().clamp(min=1)
    tried = float(torch.maximum(spread(on_support) / PRIOR_SPREAD, rounding)) * _TRIED
    loss = _TRIED.log().square()
    if parts:
        logits, true = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        found = logits.double() / tried[:, None, None]
        each = F.cross_entropy(found.flatten(0, 1), true.repeat(len(tried)), reduction="none")
        loss = loss + each.unflatten(0, (len(tried), -1)).sum(1)
    return float(tried[loss.argmin()])
