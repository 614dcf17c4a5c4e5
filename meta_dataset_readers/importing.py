"""Import modules that bring large libraries. Imports nothing large itself."""

import gc
import importlib
from types import ModuleType


def imported(module: str) -> ModuleType:
    """The module of this dotted name, imported without looking for garbage meanwhile.

    Python looks for it whenever some hundred objects are new, and walks through all that are there; the
    thousands of objects of a library are none. That takes a fifth of the time of importing torch.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collects:
            gc.enable()
