# The networks of AMT's tables (NeurIPS 2024): the pool and two fully tuned baselines, trained on ImageNet's
# classes. networks 5w1s FLAGS... trains OUT/train/{amt,querying,pmf}_5w1s; FLAGS fix the shots.
#
# From the paper or its published code: DINO ViT-S/16 at 128 px; ImageNet's classes alone for training; a LoRA
# of rank 8 for each epsilon, of which two are merged; learning rate 5e-4, 30 epochs with 5 of warm-up, beta 6,
# 10 attack steps; 2000 episodes an epoch.
# From other papers: adversarial querying with 7 attack steps (Goldblum et al. 2020).
# Ours, since nothing is published: the loss of PGD-20 in the tables, cross-entropy and margin; the levels 8, 6, 0.1 and 0.01, the radius of the weight perturbation and
# the start of the attack (the defaults of main.py), and of the two baselines learning rate and epochs.
# Time: not measured; the pool alone is 240,000 steps, each of which takes 23 s on two idle CPU cores.

networks() {
    local common=(
        --arch dino_small_patch16 --base_sources ilsvrc_2012 --min_ways 5 --max_ways_upper_bound 5 "${@:2}"
        --epochs 30 --warmup_epochs 5 --nEpisode 2000 --nValEpisode 120
    )
    train "amt_$1" "${common[@]}" --pgd_method adsv --rank 8 --epsilon 8 6 0.1 0.01 --attack_iters 10 \
        --beta 6 --lr 5e-4
    train "querying_$1" "${common[@]}" --tune full --pgd_method querying --epsilon 8 --attack_iters 7 --lr 5e-5
    train "pmf_$1" "${common[@]}" --tune full --pgd_method standard --lr 5e-5
}

# rows NAME_ENDING NETWORKS FLAGS...: the rows of a table, for example rows _1shot 5w1s --n_shot 1 ...
# From other papers: fine-tuning at test time as in P>M>F (100 steps, rate 1e-4, augmented). Ours: what merging
# needs to be told is chosen on ImageNet's VALID classes; what the published code does, choosing on labelled
# test episodes, is a row of its own. The authors' own pool is a row where its file is in CHECKPOINTS.
rows() {
    local end=$1 trained=$out/train pool=$out/train/amt_$2/best.safetensors
    local released=$checkpoints/metadataset_imagenet_advmetatuned_$2.pth
    local flags=(--arch dino_small_patch16 --nTestEpisode 600 --epsilon 8 "${@:3}")
    local merging=(--deploy merge-vanilla --top_k 2)
    evaluate "pretrained$end" "${flags[@]}"
    evaluate "pmf$end" "${flags[@]}" --resume "$trained/pmf_$2/best.safetensors" \
        --deploy finetune --ada_steps 100 --ada_lr 1e-4 --aug_prob 0.9 --aug_types color translation
    evaluate "querying$end" "${flags[@]}" --resume "$trained/querying_$2/best.safetensors" --deploy vanilla
    # Trained against 8/255, the first of the pool.
    evaluate "one_lora$end" "${flags[@]}" --resume "$pool" --specified_expert 0
    evaluate "amt$end" "${flags[@]}" --resume "$pool" "${merging[@]}" --select_on ilsvrc_2012
    evaluate "amt_selected_as_published$end" "${flags[@]}" --resume "$pool" "${merging[@]}" --select published
    if [ -e "$released" ]; then
        evaluate "released$end" "${flags[@]}" --resume "$released" "${merging[@]}" --select_on ilsvrc_2012
    fi
}
