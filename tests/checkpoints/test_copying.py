"""Copies of weights by the native library against numpy, ml_dtypes and the gguf package: the same bits, at every length."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from pjax import native
from pjax.checkpoints import copying
from pjax.checkpoints.gguf_types import BLOCKS, GGUFType
from pjax.checkpoints.quantised import Quantised

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


pytestmark = pytest.mark.usefixtures("cpu_level")


def test_the_library_was_built() -> None:
    assert native.library() is not None, "make test builds it"


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def random_bits(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of every kind: NaN, infinite and denormal ones too."""
    kind = f"u{dtype.itemsize}"
    return np.random.default_rng(0).integers(0, 1 << 8 * dtype.itemsize, shape, dtype=kind).view(dtype)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        copying.copy_and_check(np.empty((4, 8), np.float32), np.ones((4, 9), np.float32))


@pytest.mark.parametrize("target_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("source_type", list(FLOATS))
@pytest.mark.parametrize("shape", [(1,), (31,), (32,), (7, 33), (3, 5, 64), (129, 521), (0, 4)])
def test_floats(source_type: str, target_type: str, shape: tuple[int, ...]) -> None:
    array = random_bits(FLOATS[source_type], shape)
    memory = np.full(array.size + 64, 7, FLOATS[target_type])
    target = memory[: array.size].reshape(shape)
    assert copying._by_native(target, array) is not None
    bad = copying.copy_and_check(target, array)
    with np.errstate(all="ignore"):
        expected = array.astype(FLOATS[target_type])
    assert bad == np.count_nonzero(~np.isfinite(expected.astype(np.float32)))
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(bits(target)[~is_nan], bits(expected)[~is_nan])
    assert np.isnan(target.astype(np.float32)[is_nan]).all()
    if source_type == target_type:
        np.testing.assert_array_equal(bits(target), bits(array))
    assert (memory[array.size :] == 7).all()


def test_every_float16() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    target = np.empty(1 << 16, np.float32)
    assert copying.copy_and_check(target, values) == 2 * 1024  # both signs: the infinite one and 1,023 NaN
    np.testing.assert_array_equal(bits(target[np.isfinite(values)]), bits(values.astype(np.float32)[np.isfinite(values)]))


@pytest.mark.parametrize("target_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [GGUFType.Q8_0, GGUFType.Q4_0, GGUFType.Q4_1], ids=lambda kind: kind.name)
def test_quantised(kind: GGUFType, target_type: str) -> None:
    """Random bits too: scales that are NaN, infinite or denormal."""
    theirs = GGMLQuantizationType(kind)
    normal = np.random.default_rng(0).standard_normal((37, 96), dtype=np.float32)
    for blocks in (quantize(normal, theirs), random_bits(np.dtype(np.uint8), (37, 3 * BLOCKS[kind][1]))):
        with np.errstate(all="ignore"):
            expected = dequantize(blocks, theirs).astype(FLOATS[target_type])
        array = Quantised(blocks.reshape(-1), (37, 96), kind)
        target = np.empty((37, 96), FLOATS[target_type])
        assert copying._by_native(target, array) is not None
        assert copying.copy_and_check(target, array) == np.count_nonzero(~np.isfinite(expected.astype(np.float32)))
        is_nan = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(bits(target)[~is_nan], bits(expected)[~is_nan])
        assert np.isnan(target.astype(np.float32)[is_nan]).all()


def test_what_the_library_does_not_have_is_numpys() -> None:
    target, values = np.empty((4, 64), np.float32), np.ones((4, 64), np.float32)
    k_quant = Quantised(np.zeros(4 * 144, np.uint8), (4, 256), GGUFType.Q4_K)
    for to, array in (
        (target, values.astype(np.float64)),
        (np.empty((4, 64), np.float16), values),
        (target, values.astype(">f4")),
        (target, np.ones((64, 4), np.float32).T),
        (np.empty((4, 256), np.float32), k_quant),
    ):
        assert copying._by_native(to, array) is None
        assert copying.copy_and_check(to, array) == 0
        np.testing.assert_array_equal(to, np.asarray(array))


def test_threads_share_a_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "NUM_THREADS", 3)
    array = random_bits(FLOATS["bfloat16"], (1031, 1024))
    target = np.empty(array.shape, np.float32)
    copying.copy_and_check(target, array)
    np.testing.assert_array_equal(bits(target), bits(array).astype(np.uint32) << 16)


def test_rows_of_a_quantised_tensor_stay_quantised() -> None:
    values = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    array = Quantised(quantize(values, GGMLQuantizationType.Q8_0).reshape(-1), (8, 64), GGUFType.Q8_0)
    order = np.array([3, 3, 0, 7, 1])
    chosen = array[order]
    assert isinstance(chosen, Quantised) and chosen.shape == (5, 64)
    np.testing.assert_array_equal(np.asarray(chosen), np.asarray(array)[order])


def test_blocks_are_those_of_the_gguf_package() -> None:
    for kind, sizes in BLOCKS.items():
        theirs = GGMLQuantizationType(kind)
        assert (theirs.name, tuple(GGML_QUANT_SIZES[theirs])) == (kind.name, sizes)
    assert set(BLOCKS) == set(GGUFType)
