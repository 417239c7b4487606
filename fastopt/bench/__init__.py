"""``python -m fastopt bench``: fastopt beside torch, each result checked before it is timed."""
