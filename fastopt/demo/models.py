"""The two networks of the demo. Neither has dropout, so a seed fixes the whole training."""

import torch
from torch import nn


def cnn():
    """Two convolutions, a pool, two linear layers: PyTorch's MNIST example without dropout; 1 199 882 parameters."""
    features = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))


def lenet():
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling on 28 x 28 pixels; 44 426 parameters."""
    first = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
    classes = nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    return nn.Sequential(*first, *second, nn.Flatten(), *classes)


MODELS = {"cnn": cnn, "lenet": lenet}


def build(name, seed):
    """The network ``name`` with the weights that ``seed`` draws; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()
