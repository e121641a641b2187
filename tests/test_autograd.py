"""Honesty towards autograd, the dispatcher and torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neutralize import _native, ops
from neutralize.errors import NeutralizeError

REWRITE = torch.ops.neutralize.rewrite_.default
FOLD = torch.ops.neutralize.rescale_fold_.default


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["native", "reference"])
def test_versions_are_bumped(device: torch.device, layout: str) -> None:
    weight = torch.ones(3, 3, device=device)
    weight = weight.t() if layout == "reference" else weight
    bias = torch.ones(3, device=device)
    other = torch.ones(3, device=device)
    before = weight._version, bias._version, other._version
    ops.rewrite_(weight, scale=2.0)
    assert weight._version > before[0]
    middle = weight._version
    ops.rescale_fold_(weight, bias, scale=2.0, shift=1.0)
    assert weight._version > middle
    assert bias._version > before[1]
    assert other._version == before[2]


def test_a_refused_call_bumps_nothing() -> None:
    weight = torch.ones(3)
    before = weight._version
    with pytest.raises(NeutralizeError):
        ops.rewrite_([weight, weight], scale=2.0)
    assert weight._version == before


@pytest.mark.parametrize("op", ["rewrite_", "rescale_fold_"])
def test_backward_through_a_rewritten_weight_raises(op: str, device: torch.device) -> None:
    layer = torch.nn.Linear(4, 4).to(device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    out = layer(x).sum()
    if op == "rewrite_":
        ops.rewrite_(layer.weight, scale=0.5)
    else:
        ops.rescale_fold_(layer.weight, layer.bias, scale=0.5, shift=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    # and after the rewrite all is as usual again
    layer(x).sum().backward()
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    assert torch.equal(x.grad, layer.weight.sum(0).detach().expand(2, 4))


def test_grad_mode_is_left_as_it_was() -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            ops.rewrite_(torch.ones(2), scale=2.0)
            with pytest.raises(NeutralizeError):
                ops.rewrite_(torch.ones(2, dtype=torch.int32))
            assert torch.is_grad_enabled() is enabled


def test_inference_tensors() -> None:
    """Weights loaded under inference mode have no version; they are rewritten outside of it too."""
    with torch.inference_mode():
        weight, square = torch.ones(3), torch.ones(3, 3)
        ops.rewrite_(weight, scale=2.0)
    ops.rewrite_([weight, square.t()], scale=2.0)
    assert weight.tolist() == [4.0] * 3
    assert square.eq(2.0).all()
    normal = torch.ones(3)
    with torch.inference_mode():
        ops.rewrite_(normal, scale=3.0)
    assert normal.tolist() == [3.0] * 3


# ---- the dispatcher --------------------------------------------------------------------------------------------------
def test_kernels_are_registered() -> None:
    for op in ("neutralize::rewrite_", "neutralize::rescale_fold_"):
        native = _native.build_info()["native"]["loaded"]
        for key in ("CPU", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key) is (native or key == "Meta")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") is _native.build_info()["cuda"]["loaded"]


def opcheck_arguments(device: torch.device | str) -> list[tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device=device, requires_grad=grad)

    one = ([0.5], [1.0], [0.1], [0], [1])
    two = ([0.5, 0.0], [1.0, 0.0], [0.1, 0.0], [0, 1], [1, 2])
    return [
        (REWRITE, ([ones(4, 4)], *one)),
        (REWRITE, ([ones(4, 4), ones(3, dtype=torch.bfloat16)], *two)),
        (REWRITE, ([ones(4, 4)[:, 1:3], ones(5, 2, 2, dtype=torch.float16)], *one)),
        (FOLD, ([ones(4, 5)], [ones(4)], [0.5], [0.1])),
        (FOLD, ([ones(4, 5), ones(2, 3, 3)], [ones(4), ones(2)], [0.5, 2.0], [0.1, 0.2])),
    ]


@pytest.mark.parametrize("case", range(5))
def test_opcheck(case: int, device: torch.device) -> None:
    op, arguments = opcheck_arguments(device)[case]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("case", range(5))
def test_opcheck_on_meta(case: int) -> None:
    op, arguments = opcheck_arguments("meta")[case]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_meta_kernels_check() -> None:
    weight = torch.ones(3, 2, device="meta")
    with pytest.raises(RuntimeError, match="expected 1 or 1 numbers for scale, got 2"):
        REWRITE([weight], [0.5, 0.5], [1.0], [0.1], [0], [1])
    with pytest.raises(RuntimeError, match="expected 1 tensors for biases"):
        FOLD([weight], [], [0.5], [1.0])


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        weight = torch.ones(3, 3)
        ops.rewrite_([weight, torch.ones(2, 2).t()], scale=2.0)
        ops.rescale_fold_(weight, torch.ones(3), scale=2.0, shift=1.0)
        with pytest.raises(NeutralizeError, match="expected one of float64"):
            ops.rewrite_(torch.ones(3, dtype=torch.int64))


# ---- torch.compile ---------------------------------------------------------------------------------------------------
BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_around_a_call(backend: str, dynamic: bool, device: torch.device) -> None:
    def halve(x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
        y = x @ weights[0]
        ops.rewrite_(weights, scale=0.5, diagonal=1.0)
        ops.rescale_fold_(weights[0], bias, scale=2.0, shift=1.0)
        ops.rewrite_(weights[1].t(), diagonal=[0.25], start=1)
        return y + x @ weights[0] + bias

    def arguments() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
        return make(2, 8), [make(8, 8), make(5, 6)], make(8)

    eager, traced = arguments(), arguments()
    expected = halve(*eager)
    actual = torch.compile(halve, backend=backend, fullgraph=True, dynamic=dynamic)(*traced)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(traced[1][0], eager[1][0])
    assert torch.equal(traced[1][1], eager[1][1])
    assert torch.equal(traced[2], eager[2])


def test_compile_with_a_coefficient_as_argument() -> None:
    def rescale(x: torch.Tensor, scale: float) -> torch.Tensor:
        ops.rewrite_(x, scale=scale)
        return x + 1

    compiled = torch.compile(rescale, backend="aot_eager", fullgraph=True)
    for scale in (0.5, 2.0, 0.3, 0.7):
        x = torch.ones(4)
        assert torch.equal(compiled(x, scale), torch.ones(4) * scale + 1)
        assert torch.equal(x, torch.ones(4) * scale)


def test_compile_refuses_what_float32_does_not_hold_in_every_layout() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        ops.rewrite_(x.t(), scale=1e39)
        return x

    with pytest.raises(Exception, match="expected a number that float32 holds for scale"):
        torch.compile(wrong, backend="eager", fullgraph=True)(torch.ones(2, 3))


def test_compile_refuses_too() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        ops.rewrite_(x, scale=float("nan"))
        return x

    with pytest.raises(Exception, match="expected a finite number for scale"):
        torch.compile(wrong, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_compiled_before_a_rewrite_uses_the_new_weights(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        ops.rewrite_(model[2].weight, diagonal=1.0)
        ops.rewrite_(model[2].bias, fill=0.0)
        torch.testing.assert_close(compiled(x), model[0](x).relu())


def test_import_does_not_initialise_cuda() -> None:
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()
