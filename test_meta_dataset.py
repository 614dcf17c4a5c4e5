"""Meta-testing: merge the pool anew for every task, and measure it per domain, clean and under attack.

    python test_meta_dataset.py --arch vit_mini_amt_merge --resume runs/x/best.safetensors \\
        --data_path data/mini --test_sources mini_signs digits --output_dir results/x --epsilon 4 8

For each episode the support set decides the coefficients (amt/tasks/merge.py), the adapters are merged into
one network, singular values are trimmed if asked for, and prototypes classify the query images; then the same
network is attacked. Nothing is chosen on the episodes that are scored, unless --select published says so.

Every episode's row is on the disk as soon as it is known: the same command continues a run that was stopped,
and processes with --shard I/N, or under torchrun, share one --output_dir.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import sys

from amt.cli import meta_test
from meta_dataset_readers.errors import exit_on_bad_input


def main() -> int:
    return meta_test.main(sys.argv[1:], prog=None)


if __name__ == "__main__":
    exit_on_bad_input(main)
