"""The published ways of robust pretraining, and what a file cannot say of them. Knows no tensors."""

from meta_dataset_readers.errors import InputError, nearest

# By published name: whether such networks normalise their input.
PRETRAININGS = {
    "ACL": True,
    "AdvCL": False,
    "A-InfoNCE": False,
    "DeACL": True,
    "DynACL": True,
    "DynACL++": True,
    "DynACL_AIR": True,
    "DynACL_AIR++": True,
    "DynACL_RCS": True,
}


def published_name(text: str) -> str:
    """The published name of a pretraining, given with - or _, in any case. Raises InputError if unknown."""
    names = {name.replace("_", "-").lower(): name for name in PRETRAININGS}
    try:
        return names[text.replace("_", "-").lower()]
    except KeyError:
        raise InputError(f"--pretraining {text!r} is not known; {nearest(text, PRETRAININGS)}") from None
