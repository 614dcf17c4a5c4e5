"""Whether a merge has diluted its robust adapters, known from the shares alone, without an attack.

In the mini study, moving a quarter of the weight from the adapter for 8/255 to one for 0.1/255 cost more than
half of the robust accuracy at 8/255, and half of the weight nearly all of it.
"""

from collections.abc import Sequence

import numpy as np

NEAR_CLEAN = 0.5  # 1/255: up to here an adapter has seen next to no attack
ROBUST = 1.0  # 1/255: from here on it is meant to withstand one
MOST_NEAR_CLEAN = 0.3  # of the weight


def dilution(
    coefficients: Sequence[Sequence[float]], epsilons: Sequence[float], single: str = "--specified_expert"
) -> str:
    """A line to warn with; empty where near-clean adapters have at most `MOST_NEAR_CLEAN` of the weight, or
    no adapter is robust.

    Args:
        coefficients: of one or several tasks, one per adapter.
        epsilons: of the adapters, in 1/255.
        single: the command's flag that takes one adapter alone.
    """
    levels = np.array(epsilons)
    near_clean, strongest = levels <= NEAR_CLEAN, levels.max(initial=0)
    if not len(coefficients) or strongest < ROBUST:
        return ""
    share = float(np.mean(np.array(coefficients), axis=0)[near_clean].sum())
    if share <= MOST_NEAR_CLEAN:
        return ""
    return (
        f"{100 * share:.0f}% of the weight is on adapters for at most {levels[near_clean].max():g}/255, "
        f"which usually costs most of the robustness that the one for {strongest:g}/255 has; --route_epsilon "
        f"{strongest:g} scores under attack, {single} {int(levels.argmax())} takes that one alone"
    )
