"""The demo: a small CNN trained twice on handwritten digits, by stock torch and by fastopt, side by side.

``models`` builds the networks, ``data`` finds or draws the digits, ``train`` runs the two trainings step by step,
``parity`` judges whether they agree, ``report`` and ``plot`` show the outcome, ``cli`` is ``python -m fastopt demo``,
``processes`` shares the work where torchrun has launched several.
"""
