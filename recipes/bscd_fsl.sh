#!/usr/bin/env bash
# AMT's table on BSCD-FSL (NeurIPS 2024): 5-way 1-shot and 5-shot, four domains, clean and under PGD-20 at 8/255.
#
#     recipes/bscd_fsl.sh DATA OUT [--dry_run]    the pages are OUT/bscd_fsl/table_1shot.html and table_5shot.html
#
# Data: CropDisease, EuroSAT, ISIC 2018 and ChestX-ray8, unpacked as downloaded; Meta-Dataset's ilsvrc_2012 for
# training and for choosing the merging. Weights: DINO's ViT-S/16. The networks are those of the Meta-Dataset
# recipes: in an output folder where they have run, they are done already.
# From the benchmark: 5 ways, 15 queries, 600 episodes; of its shots (5, 20, 50) the authors published a network
# for 5, and one for 1. Ours: 128 px as in training; these domains have no VALID classes, so what merging needs
# to be told is chosen on ImageNet's.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/networks.sh"

networks 5w1s --max_support_size_contrib_per_class 1
networks 5w5s --num_support 5
domains=(--cdfsl_domains CropDisease EuroSAT ISIC ChestX --test_n_way 5)
for shots in 1 5; do
    rows "_${shots}shot" "5w${shots}s" "${domains[@]}" --n_shot $shots
    page "table_${shots}shot.html"
done
