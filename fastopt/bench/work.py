"""A case made ready: its inputs, a provider's call on them, and the error of what that call computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

N_CHECKED_STEPS = 3
N_CHECKED_LOGITS = 2**22  # a larger gradient is checked in so many, whole rows evenly spaced
N_AT_ONCE = 2**20  # logits in float64


@dataclass
class Started:
    """A provider's call, and what it leaves behind."""

    call: Callable
    results: Callable  # what the call has computed, as a list of tensors
    reset: Callable = lambda: None  # drops what the last call left, and gives back inputs it wrote into


@dataclass
class Verdict:
    error: float
    allowed: float

    @property
    def ok(self):
        return self.error <= self.allowed  # NaN is not


def prepare(case, device):
    return (OptimizerWork if case.kind == "optimizer" else LossWork)(case, device)


class OptimizerWork:
    """Each provider's parameters start equal; gradients are shared, for no step may write them."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape):
            return torch.randn(shape, generator=generator, device=device).mul_(0.1).to(case.dtype)

        self.params = [normal(shape) for shape in case.shapes]
        self.grads = [normal(shape) for shape in case.shapes]
        self._expected = None

    @property
    def bytes_each(self):
        """Bytes that each provider holds beside the inputs, at most."""
        return self.case.n_arrays * self.case.n_params * self.case.dtype.itemsize

    def start(self, provider):
        params = [torch.nn.Parameter(param.clone()) for param in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return Started(provider.make(self.case, params), lambda: [param.detach() for param in params])

    def check(self, started):
        """The largest error of a parameter after some steps, beside torch's for-loop."""
        for _ in range(N_CHECKED_STEPS):
            started.call()
        if self._expected is None:
            self._expected = self._torch_results()
        is_exact = self.case.dtype == torch.float32
        eps, share = torch.finfo(self.case.dtype).eps, 1e-4 if is_exact else 5e-2
        errors, updates, sizes = [], [], []
        for ours, theirs, before in zip(started.results(), self._expected, self.params, strict=True):
            errors.append((ours.float() - theirs).abs().max())
            updates.append((theirs - before.float()).abs().max())
            sizes.append(theirs.abs().max())
        # max of a tensor hands NaN on; Python's does not.
        error, update, size = (torch.stack(values).max().item() for values in (errors, updates, sizes))
        rounding = N_CHECKED_STEPS * eps / 2 * size  # each step may round a parameter the other way
        return Verdict(error, share * update + rounding)

    def _torch_results(self):
        params = [torch.nn.Parameter(param.float().clone()) for param in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad.float()
        optimizer = getattr(torch.optim, self.case.optimizer)(params, **self.case.options, foreach=False)
        for _ in range(N_CHECKED_STEPS):
            optimizer.step()
        return [param.detach() for param in params]


class _Logits(torch.autograd.Function):
    """Hands on logits as a layer would: no leaf of the graph, so that their memory may be reused."""

    @staticmethod
    def forward(ctx, seed, logits, gradients):
        ctx.gradients = gradients
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.gradients[:] = [grad]
        return None, None, None


class LossWork:
    """All providers share the logits, but for those that write into them."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        self.logits = torch.randn(case.shape, generator=generator, device=device).to(case.dtype)
        if case.is_channels_last:
            self.logits = self.logits.contiguous(memory_format=torch.channels_last)
        if case.has_probabilities:
            self.target = torch.randn(case.shape, generator=generator, device=device).softmax(1).to(case.dtype)
        else:
            positions = (case.shape[0], *case.shape[2:])
            self.target = torch.randint(case.shape[1], positions, generator=generator, device=device)
        self._expected = None

    @property
    def bytes_each(self):
        return 5 * self.logits.numel() * self.logits.element_size()

    def start(self, provider):
        function = provider.make(self.case)
        overwritten = provider.writes_logits or self.case.is_in_place
        logits = self.logits.clone() if overwritten else self.logits.detach()
        target, losses, gradients = self.target, [], []
        leaf = logits.requires_grad_(self.case.needs_grad and not self.case.is_in_place)
        seed = torch.zeros((), device=self.device, requires_grad=True)

        def alone():
            with torch.no_grad():
                losses[:] = [function(logits, target)]

        def fresh():
            leaf.grad = None
            loss = function(leaf, target)
            loss.backward()
            losses[:] = [loss]

        def in_place():
            gradients.clear()
            loss = function(_Logits.apply(seed, logits, gradients), target)
            loss.backward()
            losses[:] = [loss]

        def results():
            return [loss.detach() for loss in losses] + (gradients or [leaf.grad] * self.case.needs_grad)

        def reset():
            leaf.grad = None
            losses.clear()
            gradients.clear()
            if overwritten:
                with torch.no_grad():
                    logits.copy_(self.logits)

        call = alone if not self.case.needs_grad else in_place if self.case.is_in_place else fresh
        return Started(call, results, reset)

    def check(self, started):
        """The error of the loss or of the gradient, whichever is the larger beside what is allowed; in float64."""
        started.reset()
        started.call()
        if self._expected is None:
            self._expected = self._truth()
        share = 1e-5 if self.case.dtype == torch.float32 else 2e-2
        loss, gradient = self._expected
        ours = started.results()
        verdicts = [Verdict((ours[0].double() - loss).abs().item(), share * loss.abs().item())]
        if gradient is not None:
            error = (self._rows(ours[1])[self._checked_rows()].double() - gradient).abs().max().item()
            verdicts.append(Verdict(error, share * gradient.abs().max().item()))
        return next((verdict for verdict in verdicts if not verdict.ok), verdicts[-1])

    def _rows(self, tensor):
        return tensor.detach().movedim(1, -1).reshape(-1, self.case.shape[1])

    def _checked_rows(self):
        every = -(-self.case.n_logits // N_CHECKED_LOGITS)
        return slice(None, None, every)

    def _truth(self):
        logits = self._rows(self.logits)
        target = self._rows(self.target) if self.case.has_probabilities else self.target.reshape(-1)

        def loss_of(rows, its_target):
            its_target = its_target.double() if self.case.has_probabilities else its_target
            options = dict(label_smoothing=self.case.label_smoothing, reduction="sum")
            return F.cross_entropy(rows, its_target, **options) / self.case.n_positions

        n_rows = max(1, N_AT_ONCE // self.case.shape[1])
        pairs = zip(logits.split(n_rows), target.split(n_rows), strict=True)
        loss = sum(loss_of(rows.double(), its_target) for rows, its_target in pairs)
        if not self.case.needs_grad:
            return loss, None
        some = self._checked_rows()
        leaf = logits[some].double().requires_grad_()
        loss_of(leaf, target[some]).backward()
        return loss, leaf.grad
