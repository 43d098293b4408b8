"""The one generator of batches, for the benchmark, verification, `doctor` and all tests of the op:
paged caches with random bytes in them, slots and tables for a list of requests.

A request is (start, length): its history, the state rows of the window before `start`, is in the
state already. The same seed gives the same projections at the same positions, however the requests
are cut into calls.

    draw.py     draws a batch
    tables.py   which pages its requests hold
    caches.py   where its caches lie
    batch.py    the batch: a call of the op
"""

from .batch import CACHES, PER_TOKEN, Batch, view_like
from .caches import LAYOUTS, with_gaps
from .draw import MAX_POSITION, Spread, make_batch, random_case
from .tables import Prefixes

__all__ = [
    "CACHES",
    "LAYOUTS",
    "MAX_POSITION",
    "PER_TOKEN",
    "Batch",
    "Prefixes",
    "Spread",
    "make_batch",
    "random_case",
    "view_like",
    "with_gaps",
]
