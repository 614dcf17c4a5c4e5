"""From a support set to a classifier: merging, fine-tuning, leave-one-out."""
