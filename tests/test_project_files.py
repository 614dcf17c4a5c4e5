"""The files that a public project has beside its code agree with each other and with the code."""

import re
import tomllib

import pytest
import yaml
from commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_one_version_and_one_licence_everywhere():
    assert str(CITATION["version"]) == PROJECT["version"]
    assert re.search(
        rf"^## {re.escape(PROJECT['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert CITATION["license"] == PROJECT["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "Copyright 2026 The AMT contributors" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_the_citation_has_what_readers_of_it_ask_for():
    """The required keys of the Citation File Format 1.2.0, for the software and for each paper."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert (
        CITATION["message"]
        and CITATION["title"]
        and CITATION["authors"] == [{"name": "The AMT contributors"}]
    )
    assert len(CITATION["references"]) == 3
    for paper in CITATION["references"]:
        assert paper["type"] == "conference-paper" and paper["title"] and paper["year"] == 2024
        assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])
        assert paper["conference"]["name"] and paper["url"].startswith("https://")


def test_the_hosted_tests_do_what_everyone_runs():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in steps["steps"] if "run" in step] == [".ci/run"]
    for version in steps["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("tool", ["ruff format", "ruff check", "pyright"])
def test_hooks_run_the_tools_of_the_tests(tool):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert any(f"python -m {tool}" in hook["entry"] for hook in hooks)
