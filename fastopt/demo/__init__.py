"""``python -m fastopt demo``: a small CNN trained twice on handwritten digits, by stock torch and by fastopt."""
