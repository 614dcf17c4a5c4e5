"""Networks, pools of adapters, heads: arithmetic on dictionaries of weights."""
