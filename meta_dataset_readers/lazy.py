"""Imports that wait until they are needed, so that `--help` and `import amt` cost little. Imports nothing
large itself."""

import gc
import importlib
import sys
from collections.abc import Callable, Mapping
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


def imported_when_used(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its name.
        modules: from a module to the names that it has.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def attribute(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(imported(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return sorted(homes), attribute, names
