"""Imports torchvision where that can work.

The registry's torchvision is built for a CUDA torch. Beside a CPU torch its library does not load, and then its import
fails on two operators that were never declared. Declaring their schemas, without kernels, lets datasets and transforms
import; ``torchvision.ops.nms`` still raises torchvision's own explanation.
"""

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

import torch


@functools.cache
def import_torchvision():
    """torchvision with its datasets and transforms.

    Returns:
        (module, None), or (None, reason) where it is absent or its import fails in whatever way.
    """
    try:
        if "torchvision" not in sys.modules and _library_is_broken():
            _declared_schemas()
        import torchvision
        import torchvision.datasets
        import torchvision.transforms
    except Exception as error:  # a foreign package may fail in any way, and the demo runs without it
        return None, f"{type(error).__name__}: {error}"
    return torchvision, None


def _library_is_broken():
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return False
    names = ("_C.so", "_C_stable.so", "_C.pyd", "_C_stable.pyd")  # the latter on Windows
    paths = [Path(folder) / name for folder in spec.submodule_search_locations or () for name in names]
    libraries = [path for path in paths if path.exists()]
    try:
        for library in libraries:
            ctypes.CDLL(str(library))
    except OSError:
        return True
    return not libraries


@functools.cache  # the schemas live as long as the library that is returned
def _declared_schemas():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
