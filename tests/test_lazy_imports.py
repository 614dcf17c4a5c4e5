"""Imports cost what they need: help, errors and names come without torch."""

import gc
import os
import subprocess
import sys

import pytest
from commands import ROOT

import amt
import meta_dataset_readers
from meta_dataset_readers import lazy

HEAVY = {"torch", "timm", "torchvision", "h5py", "numpy", "PIL", "matplotlib", "yaml"}


def loaded(code: str) -> set[str]:
    """The top-level and inner modules that a fresh interpreter has after running `code`."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(sys.modules), file=sys.stderr)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ended.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["main.py", "--help"],
        ["main.py", "autolora", "--help"],
        ["test_meta_dataset.py", "--help"],
        ["amt", "-h"],
        ["amt", "train", "--help"],
        ["amt", "test", "--help"],
        ["amt", "recipe"],
    ],
)
def test_help_comes_without_torch(arguments):
    script, *words = arguments
    run = f"runpy.run_path({script!r}, run_name='__main__')" if script.endswith(".py") else ""
    run = run or "runpy.run_module('amt', run_name='__main__')"
    ending = "except SystemExit as end: assert not end.code"
    found = loaded(f"import runpy\nsys.argv = {[script, *words]!r}\ntry: {run}\n{ending}")
    assert not found & HEAVY
    assert len(found) < 300


@pytest.mark.parametrize(
    "code",
    [
        "import amt",
        "import meta_dataset_readers",
        "from meta_dataset_readers import InputError, nearest, exit_on_bad_input",
        "from meta_dataset_readers.errors import DamagedRecord",
        "from meta_dataset_readers.domains import DOMAINS",
        "from amt import Perturbation, Routing, Trim, TuneSettings, Deployment",
    ],
)
def test_names_and_errors_come_without_torch(code):
    assert not loaded(code) & HEAVY


def test_a_task_of_a_network_in_the_table_comes_without_what_takes_seconds():
    """timm brings every architecture that it knows, torchvision torch's compiler, which brings sympy."""
    slow = {"timm", "torchvision", "torch._dynamo", "sympy", "scipy.special", "matplotlib", "gradio", "httpx"}
    code = "from amt.few_shot import fitting, pictures, task_file\n"
    code += "from amt.models.network import untrained\nuntrained('vit_mini')\n"
    code += f"assert not {slow!r} & set(sys.modules)\nfrom amt.few_shot import classifier"
    assert not loaded(code) & (slow - {"scipy.special"})  # which scikit-learn needs


def test_importing_leaves_the_search_for_garbage_as_it_was(monkeypatch):
    """It is off meanwhile, on again afterwards, also where the import fails; who has it off keeps it off."""
    seen = []
    monkeypatch.setattr(lazy.importlib, "import_module", lambda name: seen.append(gc.isenabled()))
    lazy.imported("anything")
    assert seen == [False] and gc.isenabled()
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError):
        lazy.imported("meta_dataset_readers.nonsense")
    assert gc.isenabled() and lazy.imported("amt.attacks.kinds").parse_attack
    gc.disable()
    try:
        lazy.imported("amt.attacks.kinds")
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("package", [amt, meta_dataset_readers])
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None and name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


def test_a_program_lets_waiting_threads_sleep_before_torch_is_there():
    """Spinning ones made a step on shared cores twenty times slower; what the user has set stays."""
    begun = "import os\nfrom meta_dataset_readers import endings\nendings.begin()"
    ask = f"{begun}\nprint(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        run = [sys.executable, "-c", ask]
        ended = subprocess.run(run, cwd=ROOT, env=environment | given, capture_output=True, text=True)
        assert ended.stdout.strip() == expected
