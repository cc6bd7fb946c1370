"""Products of 16-bit keys are rounded once, also where the processor does not multiply them."""

from __future__ import annotations

import pytest
import torch

from memorizing.knn import packed, product
from memorizing.knn.exact import search_heads


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_accumulated_in_fp32_and_rounded_once(
    dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "is_emulated", lambda _: emulated)
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(47, 31, generator=generator).to(dtype)
    right = torch.randn(31, 19, generator=generator).to(dtype)
    out = torch.full((47, 19), torch.nan, dtype=dtype)
    wide = product.widen_for_product(right)
    assert wide.dtype == (torch.float32 if emulated else dtype)
    product.multiply_into(out, left, wide)
    expected = left.double() @ right.double()
    # Half a unit in the last place of the result, and what fp32 sums may lose.
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert bool(((out.double() - expected).abs() <= bound * 1.01).all())


def test_the_search_finds_the_same_by_either_product(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(3, 23, 17, generator=generator).bfloat16()
    keys = torch.randn(3, 4099, 17, generator=generator).bfloat16()
    found = {}
    for emulated in (False, True):
        monkeypatch.setattr(product, "is_emulated", lambda _, e=emulated: e)
        monkeypatch.setattr(packed, "widen_for_product", product.widen_for_product)
        found[emulated], _ = search_heads(queries, keys, 11, 4098, None)
    assert found[True].dtype == torch.bfloat16
    torch.testing.assert_close(
        found[True], found[False], rtol=torch.finfo(torch.bfloat16).eps, atol=0
    )


def test_fp32_products_are_left_as_they_are() -> None:
    x = torch.randn(7, 5)
    assert product.widen_for_product(x) is x
    assert not product.is_emulated(torch.float32)
