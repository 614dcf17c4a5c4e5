"""Meta-training: tune a pool, one member per robustness level, on episodes under dual perturbation.

    python main.py --arch vit_mini_amt --data_path data/mini --base_sources mini_objects --output_dir runs/x

Each episode gives every level one step: support features make prototypes, the query images are attacked,
the singular factors are moved uphill, and the natural plus robust loss at the moved factors is descended
(amt/training/meta_tune.py). After every epoch the pool is validated and saved. The same command continues a
run that was stopped or killed, to the same bits. Afterwards test_meta_dataset.py merges the pool anew for
every task. A member is a LoRA, or with --tune full a complete network; baselines train in the same loop, see
--tune and --pgd_method.

    python main.py autolora --dataset cifar10 --data DIR --arch resnet18 --checkpoint FILE --output RUN

is the other path, robust fine-tuning on an ordinary data set: amt/cli/autolora.py.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import sys

from amt.cli import autolora, meta_train
from meta_dataset_readers.errors import exit_on_bad_input


def main() -> int:
    if sys.argv[1:2] == ["autolora"]:
        return autolora.main(sys.argv[2:])
    return meta_train.main(sys.argv[1:], prog=None)


if __name__ == "__main__":
    exit_on_bad_input(main)
