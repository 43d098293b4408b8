"""The two algorithms that `impl="cpu"` replaces, native and as fast as they can honestly be. They
are here to be measured and tested against; no engine uses them.

`overlay_scan`: for each window, take its eight rows from the state, then look at every token of the
request's chunk and put the row of each that lies in the window in the place of the state's; when
all windows are pooled, save the rows. It means the same as `compress` wherever a request's tokens
stand together, in the order of their positions, and no request needs a row of another; its work
grows with the square of the chunk.

`scatter_pool`: save every row, wait, then pool each window from the state through the block table.
It relies on every token of a window having a state row of its own, and a page in the block table.
Where two positions share a row, as in a ring shorter than the chunk and seven more, or a token has
none, its entries are wrong; a row without a page is left out.

Their checks, threads and arithmetic are those of `impl="cpu"`, so where rows are unique all store
the same bits. Their plan is another one: it names the state row of each of a window's eight
positions.
"""

import functools

from . import cpu

plan = functools.partial(cpu.plan, rule=cpu.STATE_ONLY)
overlay_scan = functools.partial(cpu.bind, algorithm="overlay_scan")
scatter_pool = functools.partial(cpu.bind, algorithm="scatter_pool")
