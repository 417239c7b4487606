"""Draws handwritten-looking digits, so that the demo runs where no MNIST is.

A glyph is a few strokes through control points in the unit square. For each image the points are jittered, the
glyph is scaled, slanted, rotated and shifted, its strokes get a width, a stray stroke and noise are added. The same
seed gives the same bytes on every machine: raw bits come from PCG64, whose stream numpy fixes, and pixels from
operations that IEEE 754 rounds exactly (+ - * / sqrt), one at a time; no sin, exp or matrix product.
"""

import numpy as np

SIZE, SEED = 28, 1998
_CHUNK = 200  # images at a time; their distances to a segment stay in the cache
_SPLINE_STEPS = 3  # segments between two control points
_N_JITTER = 32  # random numbers of one image that move its control points; after them one of each range
_RANGES = (
    *((10.0, 17.5), (14.0, 21.0), (-0.15, 0.15), (-3.0, 3.0), (-2.4, 2.4)),  # scale x and y, rotation, shift x and y
    *((0.7, 1.9), (0.6, 1.0)),  # width of the strokes, and their ink
    *((0, SIZE - 1), (0, SIZE - 1), (-6, 6), (-6, 6), (0.2, 0.9), (0.0, 0.9)),  # stray stroke: start, step, width, ink
    *((0.05, 0.35), (0, 1), (0, 1)),  # noise; nothing; variant of the glyph, and slant
)

# Variants of each digit: control points, each x and y in hundredths with y down; strokes through them by index, closed
# if they end where they begin.
GLYPHS = (
    ("5005 2020 1250 2080 5095 8080 8850 8020: 012345670",),
    (
        "5005 5050 5095: 012",
        "2828 5505 5550 5595: 01 123",  # with a flag
        "3025 5205 5295 2595 8095: 01 12 324",  # with a foot
    ),
    ("1528 3008 6005 8225 7050 4075 1293 9092: 0123456 67",),
    ("1815 5005 7825 4247 8070 5095 1583: 0123 3456",),
    ("3008 1455 8855 7012 6895: 01 12 34", "6505 1065 9265 6595: 01 12 03"),  # open, closed
    ("8207 2807 2245 6040 8565 6093 1587: 01 12 23456",),
    ("7006 3530 1768 4595 8072 5250: 0123452",),
    ("1210 8708 6050 4095: 01 123", "1210 8708 6050 4095 3052 8250: 01 123 45"),  # with a bar
    ("5048 2226 5005 7826 1674 5095 8474: 01230 04560",),
    ("8028 5005 2028 4850 7860 7095: 01230 045", "8028 5005 2028 4850 8060 6293 2588: 01230 0456"),  # straight, curled
)


def draw(n, stream=0):
    """``n`` images of digits, each class equally often in every ten, of one of independent streams.

    Returns:
        images, uint8 of shape (n, 28, 28), ink bright on black; labels, uint8 of shape (n,). The first k of n are the k
        that ``draw(k, stream)`` gives.
    """
    seeds = (np.random.SeedSequence((SEED, stream, purpose)) for purpose in range(3))
    order_bits, shape_bits, noise_bits = map(np.random.PCG64, seeds)
    labels = np.argsort(_uniform(order_bits, (-(-n // 10), 10)), axis=1, kind="stable")
    labels = labels.reshape(-1)[:n].astype(np.uint8)
    draws = _uniform(shape_bits, (n, _N_JITTER + len(_RANGES)))
    noise = noise_bits.random_raw(n * SIZE * SIZE // 8).astype("<u8").view(np.uint8).reshape(n, SIZE, SIZE)
    images = np.empty((n, SIZE, SIZE), np.uint8)
    for label, variants in enumerate(GLYPHS):
        members = np.flatnonzero(labels == label)
        variant = (draws[members, -1] * len(variants)).astype(np.int64)
        for index, glyph in enumerate(variants):
            chosen = members[variant == index]
            for part in (chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)):
                images[part] = _render(glyph, draws[part], noise[part])
    return images, labels


def _uniform(bits, shape):
    """Float64 in [0, 1) from the top 53 bits of each raw number."""
    return ((bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _render(glyph, draws, noise):
    jitter, (low, high) = draws[:, :_N_JITTER], np.array(_RANGES).T
    shape = (low + (high - low) * draws[:, _N_JITTER:]).T[:, :, None]  # of each range and image
    scale_x, scale_y, t, shift_x, shift_y, *_, slant = shape
    for_pixels = (values.astype(np.float32)[:, :, None] for values in shape[[5, 6, 11, 12, 13]])
    width, full_ink, stray_width, stray_ink, grain = for_pixels
    points, strokes = glyph.split(": ")
    points = np.array([(int(xy[:2]), int(xy[2:])) for xy in points.split()]) / 100
    n_points = len(points)
    x, y = (points[:, i] - 0.5 + 0.14 * (jitter[:, i * n_points :][:, :n_points] - 0.5) for i in (0, 1))
    # Scaled, slanted, rotated and shifted from the unit square around 0 to pixels.
    x, y = x * scale_x, y * scale_y
    x = x + y * (0.5 * (slant - 0.5))
    # The rotation by 2 atan(t) without a sine: its cosine and sine are rational in t. Up to 17 degrees either way.
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = x * cos - y * sin, x * sin + y * cos
    xy = np.stack([x + (SIZE - 1) / 2 + shift_x, y + (SIZE - 1) / 2 + shift_y])

    nearest = np.full((len(draws), SIZE, SIZE), np.float32(1e9))
    for stroke in strokes.split():
        curve = _spline(xy, [int(index) for index in stroke])
        for start, end in zip(curve, curve[1:], strict=False):
            np.minimum(nearest, _square_distance(start, end), out=nearest)
    stray = _square_distance(shape[7:9, :, 0], shape[7:9, :, 0] + shape[9:11, :, 0])
    ink = np.maximum(_ink(nearest, width) * full_ink, _ink(stray, stray_width) * stray_ink)
    return np.clip(ink * 255 + (noise.astype(np.float32) - 127.5) * grain, 0, 255).astype(np.uint8)


def _spline(xy, stroke):
    """Samples, each of shape (2, n), of the Catmull-Rom spline through the points ``xy[:, :, stroke]``."""
    is_closed = stroke[0] == stroke[-1]
    knots = [stroke[-2 if is_closed else 0], *stroke, stroke[1 if is_closed else -1]]
    samples = []
    for k in range(len(stroke) - 1):
        p0, p1, p2, p3 = (xy[:, :, knot] for knot in knots[k : k + 4])
        for t in (step / _SPLINE_STEPS for step in range(_SPLINE_STEPS)):
            cubic = (3 * p1 - p0 - 3 * p2 + p3) * t
            samples.append(0.5 * (2 * p1 + (p2 - p0 + (2 * p0 - 5 * p1 + 4 * p2 - p3 + cubic) * t) * t))
    return [*samples, xy[:, :, stroke[-1]]]


def _square_distance(start, end):
    """Of each pixel from the segment between two points of shape (2, n), one segment an image."""
    step = end - start
    length2 = step[0] * step[0] + step[1] * step[1] + 1e-6
    offset = np.arange(SIZE) - start[:, :, None]
    along = (offset * (step / length2)[:, :, None]).astype(np.float32)
    t = np.clip(along[0][:, None, :] + along[1][:, :, None], 0, 1)
    offset, step = offset.astype(np.float32), step.astype(np.float32)[:, :, None, None]
    off_x, off_y = offset[0][:, None, :] - t * step[0], offset[1][:, :, None] - t * step[1]
    return off_x * off_x + off_y * off_y


def _ink(distance2, radius):
    """Coverage of a stroke of ``radius`` pixels with an edge one pixel soft."""
    return np.clip(np.float32(0.5) + radius - np.sqrt(distance2), 0, 1)
