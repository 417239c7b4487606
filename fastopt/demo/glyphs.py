"""Draws handwritten-looking digits, so that the demo runs where no MNIST is.

A glyph is a few strokes through control points in the unit square. For each image the points are jittered, the
glyph is scaled, slanted, rotated and shifted, its strokes get a width, a stray stroke and noise are added. The same
seed gives the same bytes on every machine: raw bits come from PCG64, whose stream numpy fixes, and pixels from
operations that IEEE 754 rounds exactly (+ - * / sqrt), one at a time; no sin, exp or matrix product.
"""

import numpy as np

SIZE = 28
SEED = 1998
_CHUNK = 200  # images at a time; their distances to a segment stay in the cache
_SPLINE_STEPS = 3  # segments between two control points
_N_DRAWS = 48  # random numbers of one image besides its noise; the last _N_SHAPE are not jitter
_N_SHAPE = 16

# Each class: variants of (control points as x, y with y down; strokes as indices, closed if first == last).
GLYPHS = [
    [  # 0
        (
            [
                (0.5, 0.05),
                (0.2, 0.2),
                (0.12, 0.5),
                (0.2, 0.8),
                (0.5, 0.95),
                (0.8, 0.8),
                (0.88, 0.5),
                (0.8, 0.2),
            ],
            [(0, 1, 2, 3, 4, 5, 6, 7, 0)],
        )
    ],
    [  # 1, bare, with a flag, with a foot
        ([(0.5, 0.05), (0.5, 0.5), (0.5, 0.95)], [(0, 1, 2)]),
        ([(0.28, 0.28), (0.55, 0.05), (0.55, 0.5), (0.55, 0.95)], [(0, 1), (1, 2, 3)]),
        ([(0.3, 0.25), (0.52, 0.05), (0.52, 0.95), (0.25, 0.95), (0.8, 0.95)], [(0, 1), (1, 2), (3, 2, 4)]),
    ],
    [  # 2
        (
            [
                (0.15, 0.28),
                (0.3, 0.08),
                (0.6, 0.05),
                (0.82, 0.25),
                (0.7, 0.5),
                (0.4, 0.75),
                (0.12, 0.93),
                (0.9, 0.92),
            ],
            [(0, 1, 2, 3, 4, 5, 6), (6, 7)],
        )
    ],
    [  # 3
        (
            [
                (0.18, 0.15),
                (0.5, 0.05),
                (0.78, 0.25),
                (0.42, 0.47),
                (0.8, 0.7),
                (0.5, 0.95),
                (0.15, 0.83),
            ],
            [(0, 1, 2, 3), (3, 4, 5, 6)],
        )
    ],
    [  # 4, open and closed
        ([(0.3, 0.08), (0.14, 0.55), (0.88, 0.55), (0.7, 0.12), (0.68, 0.95)], [(0, 1), (1, 2), (3, 4)]),
        ([(0.65, 0.05), (0.1, 0.65), (0.92, 0.65), (0.65, 0.95)], [(0, 1), (1, 2), (0, 3)]),
    ],
    [  # 5
        (
            [
                (0.82, 0.07),
                (0.28, 0.07),
                (0.22, 0.45),
                (0.6, 0.4),
                (0.85, 0.65),
                (0.6, 0.93),
                (0.15, 0.87),
            ],
            [(0, 1), (1, 2), (2, 3, 4, 5, 6)],
        )
    ],
    [  # 6
        (
            [(0.7, 0.06), (0.35, 0.3), (0.17, 0.68), (0.45, 0.95), (0.8, 0.72), (0.52, 0.5)],
            [(0, 1, 2, 3, 4, 5, 2)],
        )
    ],
    [  # 7, without and with a bar
        ([(0.12, 0.1), (0.87, 0.08), (0.6, 0.5), (0.4, 0.95)], [(0, 1), (1, 2, 3)]),
        (
            [(0.12, 0.1), (0.87, 0.08), (0.6, 0.5), (0.4, 0.95), (0.3, 0.52), (0.82, 0.5)],
            [(0, 1), (1, 2, 3), (4, 5)],
        ),
    ],
    [  # 8
        (
            [
                (0.5, 0.48),
                (0.22, 0.26),
                (0.5, 0.05),
                (0.78, 0.26),
                (0.16, 0.74),
                (0.5, 0.95),
                (0.84, 0.74),
            ],
            [(0, 1, 2, 3, 0), (0, 4, 5, 6, 0)],
        )
    ],
    [  # 9, straight and curled
        (
            [(0.8, 0.28), (0.5, 0.05), (0.2, 0.28), (0.48, 0.5), (0.78, 0.6), (0.7, 0.95)],
            [(0, 1, 2, 3, 0), (0, 4, 5)],
        ),
        (
            [(0.8, 0.28), (0.5, 0.05), (0.2, 0.28), (0.48, 0.5), (0.8, 0.6), (0.62, 0.93), (0.25, 0.88)],
            [(0, 1, 2, 3, 0), (0, 4, 5, 6)],
        ),
    ],
]


def draw(n, stream=0):
    """``n`` images of digits, each class equally often in every ten.

    Args:
        n: how many; the first k of n are the k that ``draw(k, stream)`` gives.
        stream: which of the independent streams of images, such as 0 to train on and 1 to test on.

    Returns:
        images, uint8 of shape (n, 28, 28), ink bright on black; labels, uint8 of shape (n,).
    """
    order_bits, shape_bits, noise_bits = (
        np.random.PCG64(np.random.SeedSequence((SEED, stream, purpose))) for purpose in range(3)
    )
    labels = np.argsort(_uniform(order_bits, (-(-n // 10), 10)), axis=1, kind="stable")
    labels = labels.reshape(-1)[:n].astype(np.uint8)
    draws = _uniform(shape_bits, (n, _N_DRAWS))
    noise = noise_bits.random_raw(n * SIZE * SIZE // 8).astype("<u8").view(np.uint8).reshape(n, SIZE, SIZE)

    images = np.empty((n, SIZE, SIZE), np.uint8)
    for label, variants in enumerate(GLYPHS):
        members = np.flatnonzero(labels == label)
        variant = (draws[members, -1] * len(variants)).astype(np.int64)
        for index, glyph in enumerate(variants):
            chosen = members[variant == index]
            for start in range(0, len(chosen), _CHUNK):
                part = chosen[start : start + _CHUNK]
                images[part] = _render(glyph, draws[part], noise[part])
    return images, labels


def _uniform(bits, shape):
    """Float64 in [0, 1) from the top 53 bits of each raw number."""
    return ((bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _render(glyph, draws, noise):
    jitter, shape = draws[:, :-_N_SHAPE], draws[:, -_N_SHAPE:]

    def between(column, low, high):
        return low + (high - low) * shape[:, column, None]

    points, strokes = glyph
    points = np.array(points)
    n_points = len(points)
    x = points[:, 0] - 0.5 + 0.14 * (jitter[:, :n_points] - 0.5)
    y = points[:, 1] - 0.5 + 0.14 * (jitter[:, n_points : 2 * n_points] - 0.5)
    x, y = _place(x, y, between)

    # Square distance from each pixel to the nearest segment, and to the stray one.
    nearest = np.full((len(draws), SIZE, SIZE), np.float32(1e9))
    for stroke in strokes:
        ends_x, ends_y = _spline(x, stroke), _spline(y, stroke)
        for k in range(ends_x.shape[1] - 1):
            _lower_to_segment(nearest, ends_x[:, k], ends_y[:, k], ends_x[:, k + 1], ends_y[:, k + 1])
    stray = np.full_like(nearest, 1e9)
    ends = [between(column, 0, SIZE - 1)[:, 0] for column in (7, 8)] + [
        between(column, -6, 6)[:, 0] for column in (9, 10)
    ]
    _lower_to_segment(stray, ends[0], ends[1], ends[0] + ends[2], ends[1] + ends[3])

    ink = _ink(nearest, between(5, 0.7, 1.9)) * between(6, 0.6, 1.0).astype(np.float32)[:, :, None]
    ink = np.maximum(ink, _ink(stray, between(11, 0.2, 0.9)) * between(12, 0.0, 0.9).astype(np.float32)[:, :, None])
    grain = (noise.astype(np.float32) - 127.5) * (between(13, 0.05, 0.35).astype(np.float32)[:, :, None])
    return np.minimum(np.maximum(ink * 255 + grain, 0), 255).astype(np.uint8)


def _place(x, y, between):
    """Scales, slants, rotates and shifts points from the unit square around 0 to pixels."""
    x = x * between(0, 10.0, 17.5)
    y = y * between(1, 14.0, 21.0)
    x = x + y * (0.5 * (between(15, 0, 1) - 0.5))
    # The rotation by 2 atan(t) without a sine: its cosine and sine are rational in t. Up to 17 degrees either way.
    t = between(2, -0.15, 0.15)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = x * cos - y * sin, x * sin + y * cos
    middle = (SIZE - 1) / 2
    return x + middle + between(3, -3.0, 3.0), y + middle + between(4, -2.4, 2.4)


def _spline(values, stroke):
    """Catmull-Rom spline through the coordinates ``values[:, stroke]``, sampled; shape (n, samples)."""
    closed = stroke[0] == stroke[-1]
    before = (stroke[-2],) if closed else (stroke[0],)
    after = (stroke[1],) if closed else (stroke[-1],)
    knots = before + tuple(stroke) + after
    samples = []
    for k in range(1, len(knots) - 2):
        p0, p1, p2, p3 = (values[:, knots[k + i]] for i in (-1, 0, 1, 2))
        for step in range(_SPLINE_STEPS):
            t = step / _SPLINE_STEPS
            cubic = (3 * p1 - p0 - 3 * p2 + p3) * t
            samples.append(0.5 * (2 * p1 + (p2 - p0 + (2 * p0 - 5 * p1 + 4 * p2 - p3 + cubic) * t) * t))
    samples.append(values[:, stroke[-1]])
    return np.stack(samples, axis=1)


def _lower_to_segment(nearest, ax, ay, bx, by):
    """Lowers ``nearest`` to the square distance of each pixel from the segments a-b, one segment per image."""
    dx, dy = bx - ax, by - ay
    length2 = dx * dx + dy * dy + 1e-6
    grid = np.arange(SIZE)
    px, py = grid - ax[:, None], grid - ay[:, None]
    along_x = (px * (dx / length2)[:, None]).astype(np.float32)[:, None, :]
    along_y = (py * (dy / length2)[:, None]).astype(np.float32)[:, :, None]
    t = along_x + along_y
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    off_x = px.astype(np.float32)[:, None, :] - t * dx.astype(np.float32)[:, None, None]
    off_x *= off_x
    t *= dy.astype(np.float32)[:, None, None]
    off_y = np.subtract(py.astype(np.float32)[:, :, None], t, out=t)
    off_y *= off_y
    off_x += off_y
    np.minimum(nearest, off_x, out=nearest)


def _ink(distance2, radius):
    """Coverage of a stroke of ``radius`` pixels with an edge one pixel soft."""
    ink = np.float32(0.5) + radius.astype(np.float32)[:, :, None] - np.sqrt(distance2)
    return np.minimum(np.maximum(ink, 0), 1)
