"""Pairs of layers for the tests of equalization: their weights, the graph around them, and what is compared."""

import numpy as np
import onnxruntime
from onnx import numpy_helper

RNG = np.random.default_rng(7)


def normal(*shape):
    """Weights whose channels are of very different ranges, along both of the first two axes."""
    spread = [np.exp2(RNG.uniform(-3, 3, (size,) + (1,) * (len(shape) - axis - 1))) for axis, size in enumerate(shape[:2])]
    return (RNG.standard_normal(shape) * np.prod(np.broadcast_arrays(*spread), axis=0)).astype(np.float32)


def weights(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def outputs(model, feed):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def assert_same_results(before, after, tolerance=1e-5):
    feed = {
        value.name: np.random.default_rng(1)
        .standard_normal([dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim])
        .astype(np.float32)
        for value in before.graph.input
    }
    for want, got in zip(outputs(before, feed), outputs(after, feed), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def made(weight, groups=1, transposed=False):
    """Largest magnitude of the weights that make each output channel, one by one, as ONNX defines the operators."""
    if not transposed:
        return np.array([np.abs(kernel).max() for kernel in weight])
    rows, channels = len(weight) // groups, weight.shape[1]
    return np.array([np.abs(weight[g * rows : (g + 1) * rows, c]).max() for g in range(groups) for c in range(channels)])


def taken(weight, groups=1, transposed=False):
    """Largest magnitude of the weights that take each input channel: the two operators are each other's transposes."""
    return made(weight, groups, not transposed)


def mild(ranges):
    """Biases in keeping with the weights, `ranges`, of their channels."""
    return (ranges * RNG.uniform(0.5, 1, len(ranges)) * RNG.choice([-1, 1], len(ranges))).astype(np.float32)


def between(middle, x="float[N, 2, 6, 6] x", y="float[N, 3, a, b] y"):
    """Two convolutions c1 and c2 with `middle` between: from h to k."""
    return f"g ({x}) => ({y}) {{ [c1] h = Conv(x, w1, b1) {middle} [c2] z = Conv(k, w2) [out] y = Relu(z) }}"


def two(**more):
    w1 = normal(4, 2, 3, 3)
    return {"w1": w1, "b1": mild(made(w1)), "w2": normal(3, 4, 1, 1)} | more
