"""Rows, statistics and the choice of settings."""
