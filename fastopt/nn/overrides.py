"""What must see a call of torch's function, and so of ours: subclasses of tensors, and modes."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import TorchFunctionMetadataMode
from torch.overrides import _get_current_function_mode_stack, _get_overloaded_args
from torch.utils._device import DeviceContext

# Subclasses with a dispatch of their own (DTensor) support torch's operators, not ours.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_overridden(tensors):
    """True if a subclass or a mode overrides torch's functions; the default device concerns new tensors only.

    While a program is compiled, a mode that records functions' names is active if Dynamo does not trace into this
    function: it replaced its namesake in torch.nn.functional when Dynamo listed torch's own functions.
    """
    harmless = (DeviceContext, TorchFunctionMetadataMode) if torch.compiler.is_compiling() else (DeviceContext,)
    # _get_overloaded_args includes plain tensors.
    return any(type(tensor) is not Tensor for tensor in _get_overloaded_args(tensors)) or any(
        type(mode) not in harmless for mode in _get_current_function_mode_stack()
    )
