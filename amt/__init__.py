"""AMT: adversarial meta-tuning of vision transformers for robust few-shot classification."""
