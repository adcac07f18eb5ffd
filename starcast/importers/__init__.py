"""Public data sets to record files: Amazon reviews, the REES46 store log, MovieLens.

A file may be plain, gzipped, or a zip; which part of a set it is shows in its first line (for
`u.data` and its like in its name). Events are written in the order of their time, whatever the
size of the set: sorted runs go to a temporary file beside the output, and are merged. Items and
users stand before their first event. An event without an id gets a hash of its source's fields
and line number, so that a second import gives the same ids.
"""

from starcast.importers.amazon import import_amazon
from starcast.importers.movielens import import_movielens
from starcast.importers.rees46 import import_rees46
from starcast.importers.writing import ImportReport

__all__ = ["ImportReport", "import_amazon", "import_movielens", "import_rees46"]
