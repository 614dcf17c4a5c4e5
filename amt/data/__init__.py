"""Ordinary data sets of labelled images, for robust fine-tuning; episodes are in meta_dataset_readers."""
