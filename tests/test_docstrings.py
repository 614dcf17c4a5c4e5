"""Docstrings of the packages that compute: shapes of tensors, and the errors that are raised."""

import ast
import re
from collections.abc import Iterator

import pytest
from commands import ROOT

PACKAGES = ("models", "attacks", "tasks", "training", "evaluation", "few_shot")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / "amt" / package).glob("*.py"))]

Function = ast.FunctionDef | ast.AsyncFunctionDef
SHAPE = re.compile(r"\((\.\.\.|[A-Za-z0-9]+( \w+)?),[^)]*\)|\b[Ss]calars?\b|any shape")
SAYS_RAISES = re.compile(r"\b[Rr]aises?\b")


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, str]]:
    """The public functions and methods of a module: name, node, and docstring, for methods with their
    class's."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            of_class = ast.get_docstring(node) or ""
            for inner in node.body:
                if isinstance(inner, Function) and (inner.name == "__init__" or inner.name[0] != "_"):
                    own = ast.get_docstring(inner) or ""
                    yield f"{node.name}.{inner.name}", inner, own if inner.name[0] != "_" else of_class


def handles_tensors(function: Function) -> bool:
    """Whether a Tensor is among the annotated arguments or what is returned."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [each.annotation for each in every] + [function.returns]
    return any(each is not None and re.search(r"\bTensor\b", ast.unparse(each)) for each in annotations)


def raises(function: Function) -> bool:
    """Whether the function's own body raises, not one that is nested in it; passing on what was caught does
    not count."""
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplemented" not in ast.unparse(node):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            left += ast.iter_child_nodes(node)
    return False


FUNCTIONS = [
    (f"{path.relative_to(ROOT).with_suffix('')}:{name}".replace("/", "."), function, text)
    for path in MODULES
    for name, function, text in public_functions(ast.parse(path.read_text(encoding="utf-8")))
]


def of(predicate) -> list:
    """The docstrings of the functions that `predicate` picks, by the functions' names."""
    return [pytest.param(text, id=name) for name, function, text in FUNCTIONS if predicate(function)]


@pytest.mark.parametrize("text", of(handles_tensors))
def test_functions_of_tensors_give_shapes(text):
    assert SHAPE.search(text), f"no shape such as (n, 3, H, W) in: {text!r}"


@pytest.mark.parametrize("text", of(raises))
def test_functions_that_raise_say_so(text):
    assert SAYS_RAISES.search(text), f"no 'Raises' in: {text!r}"


def test_every_package_is_looked_at():
    assert len(FUNCTIONS) > 150 and len(of(handles_tensors)) > 60 and len(of(raises)) > 30
