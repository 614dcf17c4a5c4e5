"""What a pool must have for the heads and trimmings that are asked for."""

from collections.abc import Iterable

from amt.files import text_prototypes
from amt.models.head_settings import PRETRAINED, TEXT, Head
from amt.models.heads import PoolStatistics
from amt.models.pool import Pool
from amt.models.trim import Trim
from meta_dataset_readers.errors import InputError


def check_heads(
    heads: Iterable[Head],
    pool: Pool | None,
    statistics: PoolStatistics | None,
    where: str,
    dim: int,
    texts: text_prototypes.TextPrototypes | None = None,
) -> None:
    """Raise an `InputError` for a head that needs what is not there: statistics, texts, a member to mix in.

    Args:
        pool, statistics: that `where` holds; None: the pretrained network, or no statistics.
        dim, texts: D, the number of features; and those of the classes, if there are some.
    """
    for head in heads:
        if head.other == TEXT:
            text_prototypes.check_width(texts, f"--head {head.name}", dim)
        if pool is None and (head.needs_statistics or head.other not in (None, TEXT)):
            raise InputError(f"--head {head.name}: needs a pool; name its checkpoint with --resume")
        if pool is not None and isinstance(head.other, int) and head.other >= len(pool):
            raise InputError(
                f"--head {head.name}: {where} holds adapters 0 to {len(pool) - 1}, expected one of them or "
                f"{PRETRAINED}"
            )
        if not head.needs_statistics:
            continue
        if statistics is None:
            raise InputError(
                f"{where}: holds no statistics for --head {head.kind}; add them: python -m amt pool {where} "
                "--statistics --data_path DIR --base_sources SOURCE --out POOL.safetensors"
            )
        if (found := statistics.source.shape[-1]) != dim:
            raise InputError(f"{where}: its statistics are of {found} features, the network has {dim}")


def check_trims(trims: Iterable[Trim], pool: Pool) -> None:
    """Raise an `InputError` unless every trimming selects layers, and only layers that members differ in."""
    matrices = {name for name, shape in pool.shapes.items() if len(shape) == 2 and name in pool.adapted}
    for trim in trims:
        selected = {name for name in pool.shapes if trim.selects(name)}
        if not selected or not selected <= matrices:
            raise InputError(
                f"--trim {trim.name}: no such layer with adapters; "
                "expected for example qkv, proj, fc1 or fc2, and the number of a block or -1 for all"
            )
