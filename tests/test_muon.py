"""Muon: against singular value decompositions, PyTorch's own, and itself spread over ranks (in test_train.py)."""

import pytest
import torch

from lib.muon import COEFFICIENTS, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48), (1, 1, 8), (1, 8, 1)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonalize(x) @ v.mT  # diagonal, if the singular vectors are the same
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-3
    large = s / s.norm(dim=-1, keepdim=True) > 0.01
    assert values[large].min() > 0.65 and values.max() < 1.25


def test_a_batch_is_its_matrices_one_by_one():
    x = torch.randn(5, 24, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalize(x), torch.cat([orthogonalize(one) for one in x.split(1)]), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 97, 33), (1, 1, 8), (2, 5, 2), (1, 3, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_is_the_iteration_in_double_precision(shape, scale):
    """Also where one singular value is above zero and all others are rounding."""
    torch.manual_seed(0)
    for x in (torch.randn(shape), torch.randn(shape)[..., :1] * torch.randn(shape)[..., :1, :]):
        expected = x.double() / x.double().norm(dim=(-2, -1), keepdim=True)
        for a, b, c in COEFFICIENTS:
            gram = expected @ expected.mT
            expected = a * expected + (b * gram + c * gram @ gram) @ expected
        assert (orthogonalize(x * scale) - expected).abs().max() < 1e-4


def test_zeros_stay_and_nan_spreads_no_further_than_its_matrix():
    x = torch.randn(3, 8, 8)
    x[0], x[1, 2, 3] = 0, torch.nan
    y = orthogonalize(x)
    assert torch.equal(y[0], torch.zeros(8, 8)) and y[1].isnan().all() and y[2].isfinite().all()


def test_steps_are_those_of_pytorchs_muon():
    """Which iterates in bf16: the same step, to two digits."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 16), (48, 16), (16, 48), (16, 16)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon, theirs_muon = Muon(ours, momentum=0.95), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours]
        muon.step(0.1, weight_decay=0.2)
        theirs_muon.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            assert (a - b).norm() < 0.02 * (a - old).norm()
            b.data.copy_(a.data)


def test_takes_matrices_alone():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
