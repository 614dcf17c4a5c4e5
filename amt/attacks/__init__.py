"""Worst-case moves of inputs and of weights: the method's own, and those of evaluation."""
