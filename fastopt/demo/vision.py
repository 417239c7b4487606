"""Imports torchvision where that can work, and says why where it cannot.

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

_schemas = None  # torch.library.Library; the schemas live as long as it does


@functools.cache
def import_torchvision():
    """torchvision with its datasets and transforms.

    Returns:
        (module, None), or (None, reason) where it is absent or its import fails in whatever way.
    """
    try:
        if "torchvision" not in sys.modules and _library_is_broken():
            _declare_schemas()
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
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    names = ("_C.so", "_C_stable.so", "_C.pyd", "_C_stable.pyd")  # the latter on Windows
    libraries = [file for folder in folders for name in names for file in folder.glob(name)]
    for library in libraries:
        try:
            ctypes.CDLL(str(library))
        except OSError:
            return True
    return not libraries


def _declare_schemas():
    global _schemas
    if _schemas is None:
        _schemas = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
