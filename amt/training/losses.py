"""The natural-plus-robust loss in the form of TRADES (Zhang et al. 2019), shared by every training path."""

from typing import NamedTuple

from torch import Tensor

from amt.attacks.losses import cross_entropy_sum, kl_sum


class RobustLoss(NamedTuple):
    """`total` = `natural` + beta * `robust`; scalars, or (P,) for P networks. See `robust_loss` for what
    `natural` is."""

    total: Tensor
    natural: Tensor
    robust: Tensor


def robust_loss(
    clean: Tensor, attacked: Tensor, labels: Tensor, beta: Tensor | float, share: float = 1.0
) -> RobustLoss:
    """Cross-entropy plus beta times the mean KL from clean to attacked.

    Args:
        clean, attacked: logits (..., Q, N), neither detached; labels are (Q,), the losses (...).
        beta: weight of the robust term, a number or (...); AutoLoRa's lambda_2.
        share: of the clean logits in the cross-entropy, in [0, 1]; the attacked ones have the rest. 1 is
            TRADES; AutoLoRa (Xu et al. 2024, eq. 6) has lambda_1 here.
    """
    natural = cross_entropy_sum(clean, labels) / len(labels)
    if share != 1:
        natural = share * natural + (1 - share) * (cross_entropy_sum(attacked, labels) / len(labels))
    robust = kl_sum(clean, attacked) / len(labels)
    return RobustLoss(natural + beta * robust, natural, robust)
