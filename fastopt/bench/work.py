"""A case made ready: its inputs, a provider's call on them, and the error of the results."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

N_CHECKED_STEPS = 3
N_CHECKED_LOGITS = 2**22  # a larger gradient is checked in so many, whole rows evenly spaced
N_AT_ONCE = 2**20  # logits in float64
LAYOUTS = {"channels_last": lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1)}  # by the trait


@dataclass
class Started:
    """A provider's call on inputs of its own."""

    call: Callable
    results: Callable  # of the last call, as a list of tensors
    reset: Callable = lambda: None  # drops the results of the last call, and restores inputs that it wrote into


def prepare(case, device):
    return (OptimizerWork if case.kind == "optimizer" else LossWork)(case, device)


class OptimizerWork:
    """Each provider's parameters start equal; gradients are shared, for no step may write them."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        random = dict(generator=torch.Generator(device).manual_seed(0), device=device)
        self.params, self.grads = (
            [torch.randn(shape, **random).mul_(0.1).to(case.dtype) for shape in case.shapes] for _ in range(2)
        )
        # Bytes that each provider holds beside the inputs, at most.
        self.bytes_each = (2 + len(case.optimizer.states)) * sum(param.nbytes for param in self.params)

    def _new_params(self, dtype):
        params = [torch.nn.Parameter(param.to(dtype, copy=True)) for param in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad.to(dtype)
        return params

    def start(self, provider):
        params = self._new_params(self.case.dtype)
        return Started(provider.make(self.case, params), lambda: [param.detach() for param in params])

    @functools.cached_property
    def _expected(self):
        optimizer = self.case.optimizer
        params = self._new_params(torch.float32 if optimizer.torch_class else torch.float64)
        step = optimizer.timed(optimizer.reference_class, params).step
        for _ in range(N_CHECKED_STEPS):
            step()
        return [param.detach().float() for param in params]

    def check(self, started):
        """The largest error of a parameter after some steps, beside torch's in float32, and the error allowed."""
        for _ in range(N_CHECKED_STEPS):
            started.call()
        triples = list(zip(started.results(), self._expected, self.params, strict=True))
        error = _largest(ours.float() - expected for ours, expected, _ in triples)
        update = _largest(expected - before.float() for _, expected, before in triples)
        # Each step may round a parameter the other way.
        rounding = N_CHECKED_STEPS * torch.finfo(self.case.dtype).eps / 2 * _largest(self._expected)
        return error, (1e-4 if self.case.dtype == torch.float32 else 5e-2) * update + rounding


def _largest(tensors):
    return torch.stack([tensor.abs().max() for tensor in tensors]).max().item()  # NaN if one is, unlike Python's max


class _Logits(torch.autograd.Function):
    """Hands on logits as a layer would: no leaf of the graph, so that their memory may be reused."""

    @staticmethod
    def forward(ctx, seed, logits):
        ctx.logits = logits
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.logits.grad = grad
        return None, None


class LossWork:
    """All providers share the logits, but for those that write into them."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        random = dict(generator=torch.Generator(device).manual_seed(0), device=device)
        logits = torch.randn(case.shape, **random).to(case.dtype)
        self.logits = LAYOUTS.get(case.trait, torch.Tensor.contiguous)(logits)
        if case.target == "indices":
            self.target = torch.randint(case.shape[1], (case.shape[0], *case.shape[2:]), **random)
            if case.trait == "half ignored":
                self.target.view(-1)[::2] = -100
        else:
            self.target = torch.rand(case.shape, **random)
            if case.target == "probabilities":
                self.target /= self.target.sum(1, keepdim=True)
            self.target = self.target.to(case.dtype)
        self.tensors = {"weight": torch.rand(case.shape[1], **random).to(case.dtype)} if case.trait == "weight" else {}
        self.bytes_each = 5 * self.logits.nbytes

    def start(self, provider):
        case, target, losses, is_in_place = self.case, self.target, [], self.case.trait == "in place"
        function = functools.partial(provider.make(case), **self.tensors)
        is_overwritten = provider.writes_logits or is_in_place
        leaf = self.logits.clone() if is_overwritten else self.logits.detach()
        ones = torch.ones_like(function(leaf, target)) if case.options.get("reduction") == "none" else None
        leaf.requires_grad_(case.needs_grad and not is_in_place)
        seed = torch.zeros((), device=leaf.device, requires_grad=True)

        def call():
            leaf.grad = None
            loss = function(_Logits.apply(seed, leaf) if is_in_place else leaf, target)
            if case.needs_grad:
                loss.backward(ones)
            losses[:] = [loss]

        def reset():
            leaf.grad = None
            losses.clear()
            if is_overwritten:
                leaf.data.copy_(self.logits)

        return Started(call, lambda: [losses[0].detach(), leaf.grad], reset)

    @functools.cached_property
    def _expected(self):
        """The mean loss, and its gradient in the rows that are checked or None; from parts that fit in memory."""
        case, logits, has_indices = self.case, self._rows(self.logits), self.case.target == "indices"
        target = self.target.reshape(-1) if has_indices else self._rows(self.target)
        options = {**case.options, "reduction": "sum"}
        n_averaged = logits.numel() if case.target == "values" else len(logits)

        def loss_of(rows, its_target):
            its_target = its_target if has_indices else its_target.double()
            return getattr(F, case.loss.name)(rows, its_target, **options) / n_averaged

        n_rows = max(1, N_AT_ONCE // case.shape[1])
        pairs = zip(logits.split(n_rows), target.split(n_rows), strict=True)
        loss = sum(loss_of(rows.double(), its_target) for rows, its_target in pairs)
        if not case.needs_grad:
            return loss, None
        leaf = logits[self._checked].double().requires_grad_()
        loss_of(leaf, target[self._checked]).backward()
        return loss, leaf.grad

    def check(self, started):
        """The error of the loss, or of the gradient if the loss is right, beside float64; and the error allowed."""
        started.reset()
        started.call()
        share = 1e-5 if self.case.dtype == torch.float32 else 2e-2
        (loss, gradient), (our_loss, our_gradient) = self._expected, started.results()
        error, allowed = (our_loss.double() - loss).abs().item(), share * loss.abs().item()
        if error <= allowed and gradient is not None:
            error = _largest([self._rows(our_gradient)[self._checked].double() - gradient])
            allowed = share * _largest([gradient])
        return error, allowed

    def _rows(self, tensor):
        return tensor.detach().movedim(1, -1).reshape(-1, self.case.shape[1])

    @property
    def _checked(self):
        return slice(None, None, -(-self.logits.numel() // N_CHECKED_LOGITS))
