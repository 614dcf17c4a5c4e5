"""The commands of `python -m amt`: a module each, and the settings they share in `options`."""
