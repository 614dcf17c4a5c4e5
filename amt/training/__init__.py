"""Meta-tuning of a pool, and AutoLoRa on an ordinary data set."""
