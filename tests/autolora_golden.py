"""Numbers recorded from the published AutoLoRa code, where they are: the folder `autolora` in AMT_GOLDEN
(default: shared/golden beside the project). Everything is read from the index or the arrays, so any set of
the same kind can be put there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))
ROOT = FOLDER / "autolora" if (FOLDER / "autolora").is_dir() else FOLDER
INDEX = json.loads((ROOT / "index.json").read_text()) if (ROOT / "lowres.npz").is_file() else None

golden = [
    pytest.mark.golden,
    pytest.mark.skipif(INDEX is None, reason=f"no reference numbers of AutoLoRa at {ROOT}"),
]


def arrays(file: str) -> dict[str, np.ndarray]:
    """All arrays of one file; empty without the numbers, so that tests can be collected."""
    if INDEX is None:
        return {}
    with np.load(ROOT / file, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def below(prefix: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under a prefix such as "state_lora/", without it."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
