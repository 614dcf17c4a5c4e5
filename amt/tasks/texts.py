"""How much a task's classifier listens to its support set, and how much to the texts of its classes.

    logits = s own + (1 - s) text        both of one spread on the support, s of `SHARES`

s has the least loss on held-out images of the support (held_out.py); where no class has two, augmented views
are classified by the head fitted to the images. Texts need no fit (Radford et al. 2021,
arxiv.org/abs/2103.00020). Tip-Adapter (Zhang et al. 2022, arxiv.org/abs/2207.09519) has such a share, and
searches it on labelled data. Uses no query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.models.heads import SPREAD, Fitted, has_two, spread
from amt.tasks.held_out import Fit, held_out

SHARES = tuple(tenth / 10 for tenth in range(11))  # of the support's head


def chosen_share(
    features: Tensor, labels: Tensor, texts: Fitted, fit: Fit, views: Tensor | None = None
) -> float:
    """The share of `SHARES` with the least loss, the least of equals.

    Args:
        features, labels: (S, D), and (S,) int64 in 0..N-1, of the support.
        texts: of the N classes, as a head.
        fit: features and labels of some support images, of all classes -> their head.
        views: (V, S, D) of augmented views of the support; needed if no class has two images.
    """
    features = features.detach()
    if views is not None and not has_two(labels):
        seen = views.detach().flatten(0, 1)
        held = [(fit(features, labels)(seen), seen, labels.repeat(len(views)))]
    else:
        held = list(held_out(features, labels, fit))
    own, said, true = (torch.cat(each) for each in zip(*((o, texts(f), y) for o, f, y in held), strict=True))
    weights = 1 / true.bincount(minlength=said.shape[1]).clamp(min=1).to(own.dtype)  # classes count the same
    own, said = (SPREAD / spread(each) * each for each in (own, said))
    losses = [F.cross_entropy(s * own + (1 - s) * said, true, weight=weights) for s in SHARES]
    return SHARES[int(torch.stack(losses).argmin())]
