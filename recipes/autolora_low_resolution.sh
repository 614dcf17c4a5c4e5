#!/usr/bin/env bash
# AutoLoRa at 32 px (ICLR 2024): ResNet-18, self-supervised and robust on CIFAR, fine-tuned on CIFAR and STL-10,
# under PGD-20 and AutoAttack.
#
#     recipes/autolora_low_resolution.sh DATA OUT [--dry_run]    a page for each pair of a file and a dataset
#
# Data: CIFAR-10, CIFAR-100 and STL-10, unpacked as downloaded, below DATA. Weights: encoders of ResNet-18 made on
# CIFAR-10 and CIFAR-100, from the authors of each pre-training (ACL, AdvCL, A-InfoNCE, DeACL, DynACL, AIR and RCS
# have repositories), saved as NAME_cifar10.pth and NAME_cifar100.pth in CHECKPOINTS; names are those of
# --pretraining. A part of the table: PRETRAININGS="ACL DynACL" SOURCES=cifar10 TARGETS=stl10.
# From the paper or its published code: the pre-trainings and the pairs of datasets; linear (SLF), adversarially
# linear (ALF) and full (AFF) fine-tuning, each from the file; epsilon 8/255, 10 steps in training; PGD-20 and
# AutoAttack on the whole test set; epochs, rates and batches of vanilla fine-tuning and of AutoLoRa, which
# `main.py autolora` knows by the name of the pre-training. TWINS has no linear modes of its own.
# Ours: a tenth of the training images decides the learning rate and the reported epoch, where the published code
# asks the test set; for TWINS the epochs and rates of vanilla, since none are published for these networks.
# Time: not measured; an epoch of AFF is 10 attack steps on every training image, and there are 25 to 100.
. "$(dirname "$0")/common.sh"

all="ACL AdvCL A-InfoNCE DeACL DynACL DynACL++ DynACL_AIR DynACL_AIR++ DynACL_RCS"
for pretraining in ${PRETRAININGS:-$all}; do
    for source in ${SOURCES:-cifar10 cifar100}; do
        for target in ${TARGETS:-cifar10 cifar100 stl10}; do
            pair=${pretraining}_${source}_$target
            flags=(
                --arch resnet18 --resize 32 --epsilon 8 --step_size 2 --dataset "$target"
                --attack pgd steps=20 loss=ce --eval_AA
                --checkpoint "$checkpoints/${pretraining}_$source.pth" --pretraining "$pretraining"
            )
            fine_tune "$pair.vanilla" ALL "${flags[@]}" --method vanilla
            fine_tune "$pair.autolora" ALL "${flags[@]}" --method autolora
            fine_tune "$pair.twins" AFF "${flags[@]}" --method twins
            page "$pair.html"
        done
    done
done
