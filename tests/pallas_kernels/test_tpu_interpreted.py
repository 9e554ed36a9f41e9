"""The TPU kernels in the interpreter that simulates DMAs, semaphores and uninitialised memory (NaN), against float64.

Pages out of bounds raise there. Compiling for real chips is tests/aot's part.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pjax.pallas_kernels import paged_attention
from tests.pallas_kernels.test_paged_attention import expected, make_case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def interpreted() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def check(
    case: str, heads: tuple[int, int, int], page_size: int, dtype: str = "float32", tolerance: float = 2e-5, **options: object
) -> None:
    num_heads, num_kv_heads, head_size = heads
    q, pool, batch, keys, values, rows = make_case(
        case, page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype
    )
    call = jax.jit(lambda q, pool, batch: paged_attention(q, pool, batch, num_kv_heads=num_kv_heads, backend="tpu", **options))
    got = np.asarray(call(q, pool, batch), np.float32)
    keys, values = ([np.asarray(jnp.asarray(x, dtype), np.float32) for x in xs] for xs in (keys, values))
    want, num_live = expected(
        q, keys, values, rows, scale=options.get("scale", head_size**-0.5),
        window=options.get("sliding_window"), softcap=options.get("logit_softcap"),
    )  # fmt: skip
    np.testing.assert_allclose(got[:num_live], want[:num_live], atol=tolerance, rtol=tolerance)
    assert (got[num_live:] == 0).all()


@pytest.mark.parametrize(
    ("case", "heads", "page_size", "options"),
    [
        ("decode", (9, 3, 64), 16, {}),
        ("mixed", (9, 3, 64), 16, {"sliding_window": 70}),
        ("mixed", (4, 2, 80), 8, {"sliding_window": 33, "logit_softcap": 2.0}),
        ("chunk", (4, 1, 256), 128, {"scale": 0.3}),
        ("prefill", (2, 2, 96), 32, {}),
        ("one", (8, 1, 112), 64, {"logit_softcap": 5.0}),
        ("padding", (4, 4, 128), 16, {}),
    ],
    ids=str,
)
def test_float32(interpreted: None, case: str, heads: tuple[int, int, int], page_size: int, options: dict[str, object]) -> None:
    check(case, heads, page_size, **options)


@pytest.mark.parametrize("heads", [(4, 2, 128), (6, 2, 64)], ids=str)
def test_bfloat16(interpreted: None, heads: tuple[int, int, int]) -> None:
    check("mixed", heads, 16, dtype="bfloat16", tolerance=1e-2)


def test_other_dtypes_are_refused() -> None:
    q, pool, batch, *_ = make_case("one", page_size=8, num_heads=4, num_kv_heads=2, head_size=64, dtype="float16")
    with pytest.raises(NotImplementedError, match="'tpu' takes float32 or bfloat16, the same for both, but q is float16"):
        paged_attention(q, pool, batch, num_kv_heads=2, backend="tpu")
