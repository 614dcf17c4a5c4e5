"""The published hyper-parameters, against every row that was recorded of the published tables."""

import json

import pytest
from autolora_golden import INDEX, ROOT, golden

from amt.cli.options.published_settings import PublishedSettings, published_settings
from amt.files.robust_weights import PRETRAININGS

MODES = ("SLF", "ALF", "AFF")
PLACES = (("cifar10", 32), ("cifar100", 32), ("stl10", 32), ("stl10", 96))

Key = tuple[str, int, str]  # data set, image size, mode


def recorded(automatic: bool) -> dict[str, dict[Key, PublishedSettings]]:
    """One recorded table, by the names as they are written there."""
    kind = "autolora" if automatic else "vanilla"
    table = json.loads((ROOT / "misc.json").read_text())[f"hyperparameters_{kind}_utils"]
    found: dict[str, dict[Key, PublishedSettings]] = {}
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        milestones = tuple(map(int, row["decreasing_lr"].split(",")))
        settings = PublishedSettings(row["lr"], row["batch_size"], row["epochs"], milestones)
        found.setdefault(row["pretraining"], {})[row["dataset"], row["resize"], row["mode"]] = settings
    return found


def missed(rows: dict[Key, PublishedSettings]) -> bool:
    """Whether a method's name was not found in the published table: nothing depends on data or mode."""
    return len(set(rows.values())) == 1


def canonical(name: str) -> str:
    return name.replace("_", "-")


@pytest.mark.parametrize("automatic", [False, True])
class TestRecorded:
    pytestmark = golden

    def test_every_row_whose_method_was_found_is_repeated(self, automatic):
        compared = 0
        for name, rows in recorded(automatic).items():
            for (dataset, size, mode), settings in rows.items() if not missed(rows) else ():
                ours = published_settings(name, dataset, size, mode, automatic)
                assert ours == settings, (name, dataset, size, mode)
                compared += 1
        assert compared > 0

    def test_what_was_missed_has_what_the_other_table_found(self, automatic):
        """Rates, batches and milestones are the same in both tables for every method found in both; so a
        method that was missed in one has those of the other, and the epochs of its own table."""
        here, there = recorded(automatic), recorded(not automatic)
        there = {canonical(name): rows for name, rows in there.items()}
        usual, usual_there = (50, 25) if automatic else (25, 50)
        assert any(map(missed, here.values()))
        for name, rows in here.items():
            others = there[canonical(name)]
            for key in rows:
                expected = others[key]
                if expected.epochs == usual_there:
                    expected = expected._replace(epochs=usual)
                if not missed(others):
                    assert published_settings(name, *key, automatic) == expected, (name, key)

    def test_methods_are_those_that_files_are_known_of(self, automatic):
        assert {canonical(name) for name in recorded(automatic)} == set(map(canonical, PRETRAININGS))


def test_the_recorded_tables_are_looked_at_where_they_are():
    assert INDEX is None or all(any(map(missed, recorded(auto).values())) for auto in (False, True))


@pytest.mark.parametrize("name", ["DynACL_AIR", "DynACL_AIR++", "DynACL_RCS", "A-InfoNCE"])
@pytest.mark.parametrize("automatic", [False, True])
def test_a_name_is_found_however_it_is_spelled(name, automatic):
    for dataset, size in PLACES:
        for mode in MODES:
            found = {
                published_settings(spelled, dataset, size, mode, automatic)
                for spelled in (name, name.replace("_", "-"), name.replace("-", "_"), name.lower())
            }
            assert len(found) == 1 and None not in found


def test_all_known_methods_have_settings_for_all_places_and_modes():
    for name in PRETRAININGS:
        for dataset, size in PLACES:
            for mode in MODES:
                for automatic in (False, True):
                    found = published_settings(name, dataset, size, mode, automatic)
                    assert found.lr > 0 and found.batch_size > 0
                    assert list(found.milestones) == sorted(set(found.milestones))


def test_the_right_entries_differ_from_the_fallback():
    """What the methods that were missed now have."""
    assert published_settings("DynACL_AIR", "cifar10", 32, "SLF", True) == (0.01, 512, 5, (10, 20))
    assert published_settings("DynACL_AIR++", "stl10", 96, "ALF", True) == (0.1, 128, 50, (10, 20))
    assert published_settings("DynACL-RCS", "cifar100", 32, "ALF", False) == (0.05, 512, 25, (10, 20))
    assert published_settings("DynACL-RCS", "stl10", 96, "AFF", False) == (0.1, 128, 25, (10, 20))


@pytest.mark.parametrize(
    "unknown",
    [("SimCLR", "cifar10", 32), ("ACL", "dtd", 32), ("ACL", "stl10", 64), ("ACL", "cifar10", 224)],
)
def test_what_was_not_published_is_none(unknown):
    assert all(published_settings(*unknown, mode, automatic=True) is None for mode in MODES)
