"""One module per command of `python -m amt`: each has `main(argv) -> int`, its first line is its summary."""
