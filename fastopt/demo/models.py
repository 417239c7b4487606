"""The two networks of the demo. Neither has dropout, so a seed fixes the whole training."""

import torch
from torch import nn


def _network(features, sizes):
    layers = [*features, nn.Flatten()]
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn():
    """Two convolutions, a pool, two linear layers: PyTorch's MNIST example without dropout; 1 199 882 parameters."""
    features = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return _network(features, (9216, 128, 10))


def lenet():
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling on 28 x 28 pixels; 44 426 parameters."""
    first = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
    return _network((*first, *second), (256, 120, 84, 10))


MODELS = {"cnn": cnn, "lenet": lenet}


def build(name, seed):
    """The network ``name`` with the weights that ``seed`` draws; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()
