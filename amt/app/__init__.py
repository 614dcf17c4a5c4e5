"""The page on which people try a pool with their own pictures, see `amt app --help`."""
