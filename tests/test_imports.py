"""The arrows: which package may import which. Read from the source, so an import inside a function counts."""

import ast

import pytest
from commands import ROOT

# A package of amt may import itself and what is listed here.
PACKAGES = {
    "attacks": set(),
    "data": set(),
    "models": {"attacks"},  # a pool knows the levels of its members
    "files": {"attacks", "data", "models"},  # both read pickles that hold arrays
    "tasks": {"attacks", "models", "files"},
    "training": {"attacks", "models", "files", "tasks"},
    "evaluation": {"attacks", "data", "models", "files", "tasks"},
    "report": {"attacks", "data", "models", "files", "tasks", "evaluation"},
    "few_shot": {"attacks", "models", "files", "tasks", "evaluation"},
    "app": {"attacks", "few_shot", "report"},
    "cli": {
        *("attacks", "data", "models", "files", "tasks", "training", "evaluation", "report", "few_shot"),
        "app",
    },
}
READERS = "meta_dataset_readers"
# Of the readers the packages below cli know what an episode is, how an error is told, how files and
# pictures of foreign origin are read, how images are scaled, how items are prepared ahead and sent to a
# device, and how a setting is declared.
OF_THE_READERS = {
    f"{READERS}.{name}"
    for name in (
        "endings",
        "episode",
        "errors",
        "feeding",
        "files",
        "json_fields",
        "loader",
        "pictures",
        "settings",
        "transforms",
    )
}
OPENING_FOLDERS = ("cli", "few_shot", "app")  # packages that people hand their folders to
SCRIPTS = {"main", "test_meta_dataset", "studies", "benchmarks", "tools", "tests"}


def modules(package: str) -> list[str]:
    """Dotted names of all modules of a package of ours."""
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(part for part in names if part != "__init__") for names in parts]


def imports(module: str) -> set[str]:
    """The modules that `module` imports, by their full dotted names; for `from a import b` where b is a
    module of ours that is a.b, otherwise a."""
    file = ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: {ast.unparse(node)}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = ROOT.joinpath(*inner.split("."))
                ours = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
                found.add(inner if ours else node.module)
    return found


def package(module: str) -> str:
    """`models` for amt.models.pool; "" for a module of amt itself."""
    return module.split(".")[1] if module.count(".") > 1 else ""


INNER = [module for module in modules("amt") if package(module)]


def test_every_package_has_a_place():
    """A new package is put into the table before anything may import it."""
    assert {package(module) for module in INNER} == PACKAGES.keys()


@pytest.mark.parametrize("module", INNER)
def test_arrows_run_one_way(module):
    found = {package(name) for name in imports(module) if name.startswith("amt.")}
    assert found - {package(module)} <= PACKAGES[package(module)]


def test_no_package_is_part_of_a_circle():
    assert all(name not in PACKAGES[below] for name, others in PACKAGES.items() for below in others)


@pytest.mark.parametrize("module", [module for module in INNER if package(module) not in OPENING_FOLDERS])
def test_amt_knows_of_the_readers_only_what_an_episode_is(module):
    assert {name for name in imports(module) if name.startswith(READERS)} <= OF_THE_READERS


@pytest.mark.parametrize("module", modules(READERS))
def test_the_readers_know_no_method_and_no_network(module):
    assert not [name for name in imports(module) if name.split(".")[0] in ("amt", "timm")]


@pytest.mark.parametrize("module", [*modules("amt"), *modules(READERS)])
def test_no_library_module_imports_a_script(module):
    assert not [name for name in imports(module) if name.split(".")[0] in SCRIPTS]


def test_imports_of_all_forms_and_at_all_depths_are_seen():
    assert {"amt.cli.meta_train", "amt.cli.autolora", "sys"} <= imports("main")
    assert {"amt.cli.options", "amt.cli.train"} <= imports("amt.cli.meta_train")  # the latter in a function
