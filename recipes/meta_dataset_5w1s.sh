#!/usr/bin/env bash
# AMT's table on Meta-Dataset (NeurIPS 2024): 5-way 1-shot, ten domains, clean and under PGD-20 at 8/255.
#
#     recipes/meta_dataset_5w1s.sh DATA OUT [--dry_run]    the page is OUT/meta_dataset_5w1s/table.html
#
# Data: the ten sources of Meta-Dataset, as converted by its own tools or by PMF's. Weights: DINO's ViT-S/16
# (main.py fetches it, or save it in checkpoints/). As published: 5-way 1-shot by the flags below, 600 episodes
# a domain, 8/255. Ours: 20 steps of PGD. More on what is whose: recipes/networks.sh.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/networks.sh"

shots=(--max_support_size_contrib_per_class 1)
networks 5w1s "${shots[@]}"
rows "" 5w1s --min_ways 5 --max_ways_upper_bound 5 "${shots[@]}" \
    --test_sources traffic_sign mscoco ilsvrc_2012 omniglot aircraft cu_birds dtd quickdraw fungi vgg_flower
page table.html
