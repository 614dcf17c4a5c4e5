"""Mini-Meta-Dataset: six small domains in Meta-Dataset's real format, made on the spot in under a minute.

    python -m meta_dataset_readers.mini --out DIR

mini_objects   the training source: shapes x textures x palettes, a graph of classes like ilsvrc_2012
mini_glyphs    characters of twelve scripts, in two levels like omniglot
mini_textures  25 surfaces, flat like dtd
mini_sketches  28 line drawings, flat like quickdraw
mini_signs     28 traffic signs, test only like traffic_sign
digits         1797 real handwritten digits, test only

A name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from meta_dataset_readers.lazy import imported_when_used

if TYPE_CHECKING:
    from meta_dataset_readers.mini.objects import object_attributes as object_attributes
    from meta_dataset_readers.mini.sources import SOURCE_NAMES as SOURCE_NAMES
    from meta_dataset_readers.mini.write import Settings as Settings
    from meta_dataset_readers.mini.write import Written as Written
    from meta_dataset_readers.mini.write import make_mini as make_mini

__all__, __getattr__, __dir__ = imported_when_used(
    __name__,
    {
        "meta_dataset_readers.mini.objects": ("object_attributes",),
        "meta_dataset_readers.mini.sources": ("SOURCE_NAMES",),
        "meta_dataset_readers.mini.write": ("Settings", "Written", "make_mini"),
    },
)
