"""The digits that the demo draws: the same everywhere, balanced, and as hard as handwriting."""

import hashlib

import numpy as np
import pytest
import torch

from fastopt.demo import data, glyphs, models


def test_drawn_digits_are_the_same_everywhere():
    images, labels = glyphs.draw(200)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "7fa0fb33e8049a53"
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "91882486860d047c"


def test_first_drawn_digits_do_not_depend_on_how_many_follow():
    images, labels = glyphs.draw(57)
    more_images, more_labels = glyphs.draw(300)
    np.testing.assert_array_equal(images, more_images[:57])
    np.testing.assert_array_equal(labels, more_labels[:57])


def test_drawn_classes_are_balanced_and_streams_differ():
    images, labels = glyphs.draw(500)
    assert np.bincount(labels, minlength=10).tolist() == [50] * 10
    assert images.shape == (500, 28, 28)
    assert images.dtype == np.uint8
    others, _ = glyphs.draw(500, stream=1)
    assert not any((other == images).all(axis=(1, 2)).any() for other in others)
    assert len(np.unique(images.reshape(500, -1), axis=0)) == 500


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11])  # none, one, and around a round of the ten classes
def test_any_number_of_digits_can_be_drawn(n):
    images, labels = glyphs.draw(n)
    assert images.shape == (n, 28, 28)
    assert labels.shape == (n,)


@pytest.mark.slow
def test_linear_model_is_less_accurate_than_lenet_on_drawn_digits():
    digits = data.draw(6000, 1000)
    images, labels = digits.normalize(digits.train.images), digits.train.labels

    def test_accuracy(model, n_epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(n_epochs):
            for rows in torch.arange(len(labels)).split(100):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            right = model(digits.normalize(digits.test.images)).argmax(1) == digits.test.labels
        return right.float().mean().item()

    torch.manual_seed(0)
    linear = test_accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), 8)
    lenet = test_accuracy(models.build("lenet", 0), 8)
    assert 0.5 < linear < 0.85
    assert lenet > 0.93
