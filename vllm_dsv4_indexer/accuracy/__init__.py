"""`vllm-dsv4-indexer accuracy`: what the indexer finds in long contexts, and what it changes.

needles.py, document.py    needles in haystacks, of the needle checkpoint
recall.py, weights.py      the share of the exact top-k that is selected, of any checkpoint
agreement.py               log-probabilities under other schedules, or of two engines
tasks.py                   lm-eval's scores of two servers
engines.py, process.py     what is asked: engines of this command, servers, transformers
model.py                   what a checkpoint's directory says of it
report.py, plot.py         tables, and the picture of the needles
command.py                 the command
"""
