"""Makes the optimizers known to ``torch.distributed.optim``, which has a table of functional optimizers by class.

ZeRO with ``overlap_with_ddp=True``, DDP's hooks with an optimizer and ``as_functional_optim`` look there. Importing the
table takes most of a second, so it is filled when somebody else imports it.
"""

import importlib.util
import sys

_TABLE = "torch.distributed.optim.utils"


def register(classes):
    """Let each class have the functional optimizer of the ``torch.optim`` class that it is derived from.

    Args:
        classes: pairs of a class and its base in ``torch.optim``.
    """
    if _TABLE in sys.modules:
        _fill(sys.modules[_TABLE], classes)
    else:
        sys.meta_path.insert(0, _FillWhenImported(classes))


def _fill(table, classes):
    for cls, base in classes:
        if base in table.functional_optim_map:
            table.register_functional_optim(cls, table.functional_optim_map[base])


class _FillWhenImported:
    """Finds the table's module as Python does, and fills the table after it has run."""

    def __init__(self, classes):
        self.classes = classes

    def find_spec(self, name, path=None, target=None):
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_fill(module):
            run(module)
            _fill(module, self.classes)

        spec.loader.exec_module = run_and_fill
        return spec
