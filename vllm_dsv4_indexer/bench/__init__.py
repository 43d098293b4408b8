"""`vllm-dsv4-indexer bench`: how long the op takes, beside vLLM's own code, the algorithms that it
replaces, and the time that the same bytes take to move.

    cases.py        what is measured: the tokens of a call, and where its caches lie (../batches)
    contestants.py  who is measured
    measure.py      how: one process for each number of threads, interleaved, cold and warm
    machine.py      where
    result.py       what comes out: bench.json
    report.py       the result as tables
    plot.py         the result as a picture
    cost.py         not how long it takes, but how many bytes it moves and holds
    command.py      the command
"""
