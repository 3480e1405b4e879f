"""Products of factors equal those of dense matrices; NaN gives NaN and raises nothing."""

from __future__ import annotations

import torch
from beartype import beartype
from jaxtyping import jaxtyped

from training_lens.measures import factors

checked = jaxtyped(typechecker=beartype)
exact, frobenius, inner, precise = map(
    checked, (factors.to_float64, factors.frobenius, factors.update_inner_product, factors.to_float32)
)
svd, svdvals = checked(factors.nan_safe_svd), checked(factors.nan_safe_svdvals)


def test_precision_never_falls() -> None:
    for dtype, wanted in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]:
        assert precise(torch.ones(2, dtype=dtype)).dtype == wanted
        assert exact(torch.ones(2, dtype=dtype)).dtype == torch.float64
    x = torch.ones(2)
    assert precise(x) is x


def test_inner_is_that_of_the_dense_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3), (9, 7), (5, 9))
    )
    dense = ((b1 @ a1) * (b2 @ a2)).sum((-2, -1))
    torch.testing.assert_close(inner(a1, b1, a2, b2), dense)


def test_frobenius_is_the_root_of_the_squares() -> None:
    assert frobenius(torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])).tolist() == [5.0, 0.0]


def test_decompositions_rebuild_the_matrix() -> None:
    matrix = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, singular, v = svd(matrix)
    torch.testing.assert_close(u @ singular.diag_embed() @ v.mT, matrix)
    torch.testing.assert_close(svdvals(matrix), singular)


def test_a_matrix_with_nan_or_infinity_gives_nan_and_leaves_the_others() -> None:
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[0, 0, 1], matrix[1, 2, 2] = torch.nan, torch.inf
    for values in (svdvals(matrix), svd(matrix)[1], svd(matrix)[0].sum(-1), svd(matrix)[2].sum(-1)):
        assert values[:2].isnan().all() and values[2].isfinite().all()
    assert svdvals(matrix[0]).isnan().all()
