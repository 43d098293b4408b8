"""`vllm-dsv4-indexer accuracy`: what the indexer finds in long contexts, and what that changes in a
model's answers.

    needles.py, document.py    needles in haystacks, of the needle checkpoint
    recall.py, weights.py      the share of the exact top-k that the engine selects
    agreement.py               log-probabilities under other schedules and of two engines
    tasks.py                   lm-eval's scores of two servers
    engines.py, process.py     who answers: an engine of this command, a server, transformers
    model.py                   what a checkpoint's directory says of it
    report.py, plot.py         tables, and the picture of the needles
    commands/                  the command
"""
