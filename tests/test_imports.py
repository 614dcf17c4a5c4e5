"""The arrows: which module may import which. Read from the source, so an import inside a function counts.

    entry scripts -> amt -> meta_dataset_readers.{episode, errors}

Inside amt the layers below; `python -m amt` and its commands are entry scripts, too. Everything else is a
rule of one line.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import modules of the layers before its own, and none of its own.
LAYERS = (
    ("pickles",),
    ("weight_files", "published_flags", "interop_learn2learn"),  # foreign formats
    ("version", "statistics"),
    ("backbone", "perturb", "protonet", "losses"),  # one piece of mathematics each
    ("pool", "attacks"),
    ("lora", "full_pool"),
    ("meta_tune", "merge", "published", "domain_config"),
    ("predict", "checkpoint", "leave_one_out"),
    ("finetune", "evaluate"),
    ("select", "sanity"),
    ("deploy", "runs"),
    ("options.parsing",),
    ("options.common",),
    ("options.training", "options.testing"),
    ("report", "journal", "options", "export", "recipes", "comparison"),  # what commands are made of
    ("page.markup", "page.pictures", "page.drawing"),
    ("page", "page.charts", "page.svg", "page.files"),
    ("page.document", "board"),
    ("conclude", "autolora", "autolora.wide_resnet", "autolora.list_files", "autolora.schedule"),
    ("autolora.networks", "autolora.labelled", "autolora.cifar", "autolora.similarity"),
    ("autolora.branch", "autolora.datasets", "autolora.pretrained", "autolora.published_settings"),
    ("autolora.data", "autolora.objectives"),
    ("autolora.tune", "autolora.corruptions", "autolora.testing"),
    ("autolora.options", "autolora.journal"),
)
# Where the layers would be too generous: all that these may import of amt.
ONLY = {
    "pickles": set(),
    "autolora.published_settings": set(),
    "attacks": {"perturb"},
    "pool": {"weight_files", "perturb"},
    "lora": {"weight_files", "perturb", "pool"},
    "full_pool": {"weight_files", "perturb", "pool"},
    "merge": {"weight_files", "backbone", "perturb", "pool", "protonet"},
    "report": {"checkpoint", "statistics"},
    "page.markup": set(),
    "page.pictures": set(),
    "page.svg": {"page.drawing", "page.markup"},
}
# Of the readers amt knows what an episode is and how an error is told; options also how episodes are drawn.
OF_THE_READERS = {"meta_dataset_readers.episode", "meta_dataset_readers.errors"}
MORE_OF_THE_READERS = {
    "options.common": {"meta_dataset_readers.sampling"},
    "autolora.labelled": {"meta_dataset_readers.transforms"},
    "autolora.data": {"meta_dataset_readers.transforms", "meta_dataset_readers.reader"},
}

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


def below(name: str, package: str) -> bool:
    """Whether `name` is `package` or a module of it."""
    return name == package or name.startswith(f"{package}.")


def allowed_within_amt(name: str) -> set[str]:
    """What the module amt.`name` may import of amt, without the prefix."""
    if name in ONLY:
        return ONLY[name]
    height = next(height for height, layer in enumerate(LAYERS) if name in layer)
    return {lower for layer in LAYERS[:height] for lower in layer}


def is_entry(module: str) -> bool:
    return module == "amt.__main__" or below(module, "amt.cli")


AMT = [module for module in modules("amt") if module != "amt" and not is_entry(module)]


def test_every_module_of_amt_has_a_place():
    """A new module is put into the table before anything may import it."""
    assert sorted(AMT) == sorted(f"amt.{name}" for layer in LAYERS for name in layer)


@pytest.mark.parametrize("module", AMT)
def test_arrows_within_amt_run_one_way(module):
    found = {name.removeprefix("amt.") for name in imports(module) if below(name, "amt")}
    assert found <= allowed_within_amt(module.removeprefix("amt."))


@pytest.mark.parametrize("module", AMT)
def test_amt_knows_of_the_readers_only_what_an_episode_is(module):
    found = {name for name in imports(module) if below(name, "meta_dataset_readers")}
    assert found <= OF_THE_READERS | MORE_OF_THE_READERS.get(module.removeprefix("amt."), set())


@pytest.mark.parametrize("module", modules("meta_dataset_readers"))
def test_the_readers_know_no_method_and_no_network(module):
    assert not [name for name in imports(module) if below(name, "amt") or below(name, "timm")]


@pytest.mark.parametrize("module", [*modules("amt"), *modules("meta_dataset_readers")])
def test_no_library_module_imports_a_script(module):
    assert not [name for name in imports(module) if name.split(".")[0] in SCRIPTS]
    assert is_entry(module) or not [name for name in imports(module) if is_entry(name)]


def test_the_readers_tell_what_the_arrows_allow():
    """The reading itself: imports of all forms and at all depths are seen."""
    assert {"amt.files.checkpoint", "amt.cli.options", "amt.models.network", "json"} <= imports("main")
    assert below("amt.models.network", "amt") and not below("amtrak", "amt")
