"""Settings that say which singular values of merged weights to remove. Knows no tensors."""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Trim:
    """Which weights lose their smallest singular values.

    Args:
        layer: ending of the layer's name, such as "qkv", "proj", "fc1" or "attn.qkv".
        block: index of the transformer block, or -1 for all.
        keep: fraction of singular values kept, in (0, 1]; at least one value stays.

    >>> Trim("qkv", block=-1, keep=0.5).selects("blocks.3.attn.qkv.weight")
    True
    """

    layer: str
    block: int
    keep: float

    @property
    def name(self) -> str:
        """As given to --trim."""
        return f"{self.layer}:{self.block}:{self.keep:g}"

    def selects(self, name: str) -> bool:
        """Whether the weight called `name`, e.g. `blocks.3.attn.qkv.weight`, is trimmed."""
        block = "blocks." if self.block == -1 else f"blocks.{self.block}."
        return name.startswith(block) and name.endswith(f"{self.layer}.weight")


def parse_trim(text: str) -> Trim:
    """Read NAME:BLOCK:KEEP, such as qkv:-1:0.5. Raises ValueError for what has another form, or KEEP
    outside of (0, 1]."""
    try:
        layer, block, keep = text.split(":")
        found = Trim(layer, int(block), float(keep))
    except ValueError:
        raise ValueError(f"{text!r}, expected NAME:BLOCK:KEEP such as qkv:-1:0.5") from None
    if not 0 < found.keep <= 1:
        raise ValueError(f"{text!r} keeps {found.keep:g}, expected a fraction in (0, 1]")
    return found


def read_trim(text: str) -> Trim:
    """`parse_trim` as the `type` of a flag: raises ArgumentTypeError in place of its ValueError."""
    try:
        return parse_trim(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
