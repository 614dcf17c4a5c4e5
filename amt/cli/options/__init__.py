"""The command lines: every flag once, checked once, turned into typed settings."""

from amt.cli.options.common import (
    add_compile,
    add_dry_run,
    add_weights_key,
    add_workers,
    arithmetic,
    reading,
    sampling,
    use_machine,
)
from amt.cli.options.parsing import (
    Parser,
    check_coefficients,
    check_distinct,
    check_increasing,
    check_output,
)
from amt.cli.options.testing import (
    TEST_SOURCES,
    add_head,
    add_merging,
    attacks,
    check_testing,
    deployments,
    finetuning,
    heads,
    needs_pretrained,
    part,
    routed,
    routing,
    selection,
    single_head,
    test_sources,
    testing_parser,
)
from amt.cli.options.training import (
    TRAINING_SOURCES,
    add_statistics,
    check_training,
    levels,
    method,
    training_parser,
    training_sources,
    tune_settings,
)
