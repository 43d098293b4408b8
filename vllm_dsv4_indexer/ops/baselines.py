"""Overlay scan and scatter, then pool: the two algorithms that one pass replaces, in native code
that is as fast as we could make it. They are for tests and measurements. No engine uses them.

`overlay_scan`: for each window, take its eight rows from the state. Then look at every token of the
request's chunk, and replace the rows that lie in the window. Save the rows after the last window.
It is right if a request's tokens stand together, in the order of their positions, and no request
needs a row of another. Its work grows with the square of the chunk.

`scatter_pool`: save every row, wait, then pool each window from the state through the block table.
It is right if every token of a window has a state row of its own and a page in the block table.
Its entries are wrong where a token has no row, or two positions share one, as in a ring shorter
than the chunk and seven more. A row without a page is left out.

Checks, threads and arithmetic are those of `impl="cpu"`, so where rows are unique all three store
the same bits. Their plan differs: it names the state row of each of a window's eight positions.
"""

import functools

from . import cpu

plan = functools.partial(cpu.plan, rule=cpu.STATE_ONLY)
overlay_scan = functools.partial(cpu.bind, algorithm="overlay_scan")
scatter_pool = functools.partial(cpu.bind, algorithm="scatter_pool")
