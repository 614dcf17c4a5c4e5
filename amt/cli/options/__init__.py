"""The command lines: every flag once, checked once, turned into typed settings."""

from amt.cli.options.common import add_dry_run, add_weights_key, reading, sampling, use_threads
from amt.cli.options.parsing import Parser, check_output
from amt.cli.options.testing import (
    TEST_SOURCES,
    add_merging,
    attacks,
    check_testing,
    deployments,
    finetuning,
    part,
    routing,
    selection,
    test_sources,
    testing_parser,
)
from amt.cli.options.training import (
    TRAINING_SOURCES,
    autocast,
    check_training,
    levels,
    method,
    training_parser,
    training_sources,
    tune_settings,
)

__all__ = [
    "TEST_SOURCES",
    "TRAINING_SOURCES",
    "Parser",
    "add_dry_run",
    "add_merging",
    "add_weights_key",
    "attacks",
    "autocast",
    "check_output",
    "check_testing",
    "check_training",
    "deployments",
    "finetuning",
    "levels",
    "method",
    "part",
    "reading",
    "routing",
    "sampling",
    "selection",
    "test_sources",
    "testing_parser",
    "training_parser",
    "training_sources",
    "tune_settings",
    "use_threads",
]
