"""Compiling the libraries of kernels, and finding them.

:mod:`recipe` and :mod:`cuda` compile them, :mod:`cache` keeps those compiled just in time, and :mod:`native` chooses the
ones that run in this process. setup.py and just-in-time builds import the modules that compile without fastopt around
them, as ``_build``: these import nothing of fastopt from other folders, and torch only inside functions.
"""
