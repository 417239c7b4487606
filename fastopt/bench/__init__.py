"""``python -m fastopt bench``: fastopt beside torch and other libraries, each checked before it is timed."""
