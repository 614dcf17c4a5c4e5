"""Kill the programs at random moments and damage every kind of file: tables of what became of it.

    make torture                       50 kills of each program, 1000 damages of each format
    make torture KILLS=5 FUZZ=50       a short try

The exit code is 1 where a killed run ended with another result, a reader crashed or hung, or a change in a
file with checksums was not noticed. Everything is drawn from --seed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torture_fuzz
import torture_kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each program; 0 leaves this part out")
    parser.add_argument(
        "--fuzz", type=int, default=1000, help="damages of each format; 0 leaves this part out"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kept = True
    if args.fuzz:
        kept &= torture_fuzz.main(args.fuzz, args.seed)
    if args.kills:
        with tempfile.TemporaryDirectory() as place:
            kept &= torture_kills.main(Path(place), args.kills, args.seed)
    print("kept: all that is promised" if kept else "BROKEN: see the tables")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
