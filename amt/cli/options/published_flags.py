"""The flags of the published scripts that nothing here needs, so that a command line from the paper runs.

The published main.py and test_meta_dataset.py share one parser of 123 flags, many of which are read nowhere.
Whatever a script of ours does not use itself is accepted with any value, has no effect, and is said to have
none. Knows names and numbers of values; what a live flag means is known to `options`.
"""

# Reason -> the flags it holds for, in underscores.
WITHOUT_EFFECT = {
    "one step is one episode, and its classes make the classifier": "batch_size num_classes unused_params",
    "last and best are always kept": "save_every_epoch start_epoch",
    "images are always drawn at random and transformed as published": (
        "shuffle train_transforms test_transforms color_jitter aa use_aa train_interpolation repeated_aug "
        "reprob remode recount resplit img_size"
    ),
    "the architecture and the weights file say so themselves": (
        "patch_size checkpoint_key pretrained_checkpoint_path unused_params drop drop_path"
    ),
    "training is SGD with a cosine schedule": (
        "opt opt_eps opt_betas weight_decay lr_scale lr_noise lr_noise_pct lr_noise_std decay_epochs "
        "cooldown_epochs patience_epochs decay_rate dr"
    ),
    "never used by the method": (
        "model_ema no_model_ema model_ema_decay model_ema_force_cpu smoothing mixup cutmix cutmix_minmax "
        "mixup_prob mixup_switch_prob mixup_mode teacher_model teacher_path distillation_type "
        "distillation_alpha distillation_tau num_adapters ada_wd attack_norm eval_restarts eval_iters"
    ),
    "there is one process, and its output is on the terminal": (
        "dist_eval pin_mem no_pin_mem logger world_size dist_url"
    ),
    "only main.py trains": (
        "epochs nEpisode lr warmup_epochs warmup_lr min_lr momentum clip_grad sched base_sources val_sources "
        "nValEpisode pgd_method delta_init beta"
    ),
    "only test_meta_dataset.py evaluates": (
        "test_sources nTestEpisode cdfsl_domains n_shot test_n_way deploy aug_prob aug_types ada_steps "
        "ada_lr blend_beta blend_gamma specified_expert"
    ),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SWITCHES = _names(
    "unused_params lr_scale use_aa repeated_aug resplit model_ema no_model_ema model_ema_force_cpu dist_eval "
    "pin_mem no_pin_mem logger"
)
_LISTS = _names(
    "train_transforms test_transforms aug_types opt_betas lr_noise cutmix_minmax base_sources val_sources "
    "test_sources cdfsl_domains specified_expert"
)
# Those that both scripts here give a meaning.
LIVE = _names(
    "fp16 output_dir device seed data_path dataset nClsEpisode nSupport nQuery image_size num_ways "
    "num_support num_query min_ways max_ways_upper_bound max_num_query max_support_set_size "
    "max_support_size_contrib_per_class min_examples_in_class min_log_weight max_log_weight "
    "ignore_bilevel_ontology ignore_dag_ontology ignore_hierarchy_probability arch pretrained_weights "
    "no_pretrain resume num_workers epsilon alpha attack_iters eval"
)


def reasons() -> dict[str, str]:
    """Why each flag has no effect, where a script does not use it."""
    return {name: reason for reason, names in WITHOUT_EFFECT.items() for name in names.split()}


def is_published(name: str) -> bool:
    """Whether the published scripts have a flag of this name (in underscores, without dashes in front)."""
    return name in LIVE or name in reasons()


def n_values(name: str) -> int | str:
    """How many values the published flag takes: 0, 1, or "+" for one or more."""
    return 0 if name in _SWITCHES else "+" if name in _LISTS else 1
