"""Products by oneDNN beside PyTorch's own; they are the same on any processor that has both."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model import products
from model.products import Linear, multiply, take_over

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)
sizes = st.integers(1, 40)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def both(given: int, gives: int, offset: bool = True) -> tuple[nn.Linear, Linear]:
    torch.manual_seed(given + 100 * gives)
    plain = nn.Linear(given, gives, bias=offset)
    ours = copy.deepcopy(plain)
    ours.__class__ = Linear
    assert isinstance(ours, Linear)
    return plain, ours


def gradients(layer: nn.Linear, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (layer(x) ** 2).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    found = [x.grad, *(each.grad for each in layer.parameters())]
    assert None not in found
    return [each for each in found if each is not None]


@given(shapes, sizes, sizes, st.booleans())
def test_a_layer_and_its_gradients_are_what_they_were(
    shape: list[int], given: int, gives: int, offset: bool
) -> None:
    plain, ours = both(given, gives, offset)
    x = torch.randn(*shape, given)
    assert_near(ours(x), plain(x))
    for mine, theirs in zip(gradients(ours, x), gradients(plain, x), strict=True):
        assert_near(mine, theirs)
    with torch.no_grad():
        assert_near(ours(x), plain(x))


def test_by_hand() -> None:
    x, weight = torch.tensor([[1.0, 2], [3, -4]]), torch.tensor([[1.0, 1], [0, 2], [-1, 0]])
    assert multiply(x, weight).tolist() == [[3, 4, -1], [-1, -8, -3]]
    assert multiply(x, weight, torch.tensor([1.0, 0, 0])).tolist() == [[4, 4, -1], [0, -8, -3]]
    curved = nn.functional.gelu(torch.tensor([[3.0, 4, -1], [-1, -8, -3]]))
    assert_near(multiply(x, weight, gelu=True), curved)


def test_numbers_need_not_lie_side_by_side() -> None:
    plain, ours = both(24, 8)
    turned, cut = torch.randn(24, 6).t(), torch.randn(6, 48)[:, 10:34]
    for x in (turned, cut):
        assert_near(ours(x), plain(x))
    above = torch.ones(1).expand(6, 8)  # as the gradient of a sum comes
    assert_near(multiply(above, plain.weight.t()), above @ plain.weight)


def test_what_is_frozen_gets_no_gradient() -> None:
    _, ours = both(4, 3)
    ours.weight.requires_grad_(False)
    ours(torch.randn(2, 4)).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert ours.weight.grad is None
    assert ours.bias.grad is not None
    assert ours.bias.grad.tolist() == [2, 2, 2]


def test_what_a_layer_makes_may_be_added_to_in_place() -> None:
    """As AdaLoRA does."""
    plain, ours = both(4, 3)
    x = torch.randn(2, 5, 4)
    for layer in (plain, ours):
        made = layer(x)
        made += 1
        (made**2).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert ours.weight.grad is not None
    assert plain.weight.grad is not None
    assert_near(ours.weight.grad, plain.weight.grad)


def test_others_are_left_to_pytorch() -> None:
    plain, ours = both(4, 3)
    row = torch.randn(4)
    assert torch.equal(ours(row), plain(row))
    rows = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(rows), plain(rows))
        assert ours(rows).dtype is torch.bfloat16
    assert ours.double()(rows.double()).dtype is torch.float64


@pytest.mark.parametrize("faster", [True, False])
def test_layers_are_taken_over_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    class Other(nn.Linear):
        """Does more than multiply."""

    monkeypatch.setattr(products, "by_onednn", lambda: faster)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)), Other(3, 1))
    names = list(model.state_dict())
    take_over(model)
    kinds = [type(each) for each in model.modules() if isinstance(each, nn.Linear)]
    expected = Linear if faster else nn.Linear
    assert kinds == [expected, expected, Other]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("processor", "width", "faster"),
    [
        ("znver5", "AVX512", True),
        ("znver3", "AVX2", False),
        ("sapphirerapids", "AVX512", False),
    ],
)
def test_mkl_is_left_to_intels_processors(
    monkeypatch: pytest.MonkeyPatch, processor: str, width: str, faster: bool
) -> None:
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    assert products.by_onednn.__wrapped__() == faster
