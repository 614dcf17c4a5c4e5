"""Everything that touches bytes of others: weight files, checkpoints, other tools' formats."""
