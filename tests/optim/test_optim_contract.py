"""What LARS and LAMB promise as torch optimisers, in anybody's loop."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigbatch.optim import LAMB, LARS, trust
from bigbatch.optim import lamb as lamb_module
from bigbatch.optim.trust import CHUNK
from optim.problems import assert_equal, parameters, problem, rates, train
from reference.lamb import lamb as lamb_twin
from reference.lars import lars as lars_twin

VARIANTS = [
    (LARS, {"weight_decay": 0.05}),
    (LARS, {"weight_decay": 0.05, "nesterov": True, "momentum_correction": True, "clip_ratio": True}),
    (LARS, {"weight_decay": 0.05, "lr_placement": "outside", "denominator": "joint"}),
    (LARS, {"momentum": 0.0, "adapt": False}),
    (LAMB, {"weight_decay": 0.05}),
    (LAMB, {"weight_decay": 0.05, "prenormalize": True, "clamp_weight_norm": 1.0, "capturable": True}),
    (LAMB, {"bias_correction": False, "adapt": False, "maximize": True}),
]
each = pytest.mark.parametrize("kind, options", VARIANTS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
both = pytest.mark.parametrize("kernel", ["fused", "foreach"])


@each
@both
@pytest.mark.parametrize("dtype, tensor_rate", [(torch.float32, False), (torch.bfloat16, True)])
def test_state_dict_continues_bit_for_bit(kind, options, kernel, dtype, tensor_rate):
    weights, gradients = problem(50, dtype=dtype)
    lrs = rates(50, 0.1)
    lr = torch.tensor(1.0) if tensor_rate else 1.0
    straight = parameters(weights)
    train(kind(straight, lr, kernel=kernel, **options), straight, gradients, lrs)

    first = parameters(weights)
    optimizer = kind(first, lr, kernel=kernel, **options)
    train(optimizer, first, gradients[:23], lrs[:23])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = parameters(saved["weights"])
    # built with other options: the saved ones must come back with the state
    optimizer = kind(second, 123.0, weight_decay=0.7)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, second, gradients[23:], lrs[23:])
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


@each
def test_state_of_other_days_and_layouts_is_taken_up(kind, options):
    """Groups without the newer options, momenta in the parameter's own precision, another memory format."""
    weights, gradients = problem(6, shapes=[(2, 3, 2, 2), (4, 3)], dtype=torch.bfloat16)
    first = parameters(weights)
    optimizer = kind(first, 0.1, **options)
    train(optimizer, first, gradients[:3], [0.1] * 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["kernel"], group["low_precision"]
    for state in saved["state"].values():
        state.pop("master")
        state |= {key: value.bfloat16() for key, value in state.items() if key != "step"}
    second = parameters([first[0].detach().to(memory_format=torch.channels_last), first[1].detach()])
    resumed = kind(second, 0.1)
    resumed.load_state_dict(saved)
    ends = [train(o, p, gradients[3:], [0.1] * 3) for o, p in ((optimizer, first), (resumed, second))]
    assert_equal(*ends, 0.02)
    assert all(s.dtype == torch.float32 for p in second for s in resumed.state[p].values())
    assert all(s.stride() == p.stride() for p in second for key, s in resumed.state[p].items() if key != "step")


@each
@both
def test_gradients_are_never_written_to(kind, options, kernel):
    weights, gradients = problem(1)
    params = parameters(weights)
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g.clone()
    before = [p.grad._version for p in params]
    kind(params, 0.1, kernel=kernel, **options).step()
    assert_equal([p.grad for p in params], gradients[0], 0)
    assert [p.grad._version for p in params] == before


@each
@both
def test_missing_gradients_are_skipped_and_their_state_waits(kind, options, kernel):
    if options.get("prenormalize"):
        options = options | {"prenormalize": False}  # couples the layers
    weights, gradients = problem(12)
    lrs = rates(12, 0.1)
    holes = [[None if (t + i) % 3 == 0 else g for i, g in enumerate(gradient)] for t, gradient in enumerate(gradients)]
    params = parameters(weights)
    train(kind(params, 1.0, kernel=kernel, **options), params, holes, lrs)
    twin = lars_twin if kind is LARS else lamb_twin
    options = {key: value for key, value in options.items() if key != "capturable"}
    for i, p in enumerate(params):
        seen = [t for t in range(12) if holes[t][i] is not None]
        expected = twin([weights[i]], [[gradients[t][i]] for t in seen], [lrs[t] for t in seen], **options)
        assert_equal([p], expected)


@each
def test_no_gradient_at_all_is_no_step(kind, options):
    params = parameters([torch.ones(2)])
    optimizer = kind(params, 0.1, **options)
    optimizer.step()
    assert params[0].tolist() == [1.0, 1.0] and not optimizer.state


@each
def test_closure_runs_with_gradients_and_its_loss_is_returned(kind, options):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = kind([p], 0.1, **options)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert p.tolist() != [1.0, 2.0]


@each
@both
def test_groups_have_their_own_options(kind, options, kernel):
    weights, gradients = problem(5)
    if options.get("prenormalize"):
        options = options | {"prenormalize": False}
    other = {"lr": 0.3, "weight_decay": 0.2, "adapt": not options.get("adapt", True), "maximize": True}
    together, one, two = (parameters(weights) for _ in range(3))
    optimizer = kind([{"params": together[:2]}], 0.1, kernel=kernel, **options)
    optimizer.add_param_group({"params": together[2:], **other})
    first = kind(one[:2], 0.1, kernel=kernel, **options)
    second = kind(two[2:], **{**options, **other, "kernel": kernel})
    for gradient in gradients:
        for params in (together, one, two):
            for p, g in zip(params, gradient, strict=True):
                p.grad = g.clone()
        for each_one in (optimizer, first, second):
            each_one.step()
    assert_equal(together, one[:2] + two[2:], 0)


@each
def test_mixed_dtypes_and_names(kind, options):
    model = torch.nn.ParameterDict({"low": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2, 2).double()})
    optimizer = kind(model.named_parameters(), 10.0, **options)
    for p in model.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == list(model.keys())
    assert (model["wide"] != 1).all()
    for p in model.values():
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert all(s.dtype == (torch.float32 if key == "step" else wide) for key, s in optimizer.state[p].items())


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_sparse_gradients_and_integer_or_complex_weights_are_refused_by_name(kind):
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight\.grad is sparse: .*sparse=False"):
        kind(embedding.named_parameters(), 0.1).step()
    with pytest.raises(ValueError, match=r"params\[0\] of shape \(2,\)\.dtype = torch\.complex64"):
        kind([torch.ones(2, dtype=torch.complex64)], 0.1)


def _layouts(draw_shapes, generator, dtype):
    for shape, layout in draw_shapes:
        t = torch.randn(shape, generator=generator, dtype=dtype)
        if layout == "transposed" and t.ndim > 1:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "channels_last" and t.ndim == 4:
            t = t.to(memory_format=torch.channels_last)
        if layout == "strided" and t.ndim:
            t = torch.stack([t, t], -1)[..., 0]
        yield t


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
            st.sampled_from(["plain", "transposed", "channels_last", "strided"]),
        ),
        min_size=1,
        max_size=4,
    ),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 100),
    same_layout=st.booleans(),
)
def test_any_shape_and_layout(shapes, variant, seed, same_layout):
    kind, options = variant
    generator = torch.Generator().manual_seed(seed)
    weights = list(_layouts(shapes, generator, torch.float64))
    gradients = [
        list(_layouts(shapes if same_layout else [(s, "plain") for s, _ in shapes], generator, torch.float64))
        for _ in range(3)
    ]
    lrs = rates(3, 0.1)
    twin = lars_twin if kind is LARS else lamb_twin
    expected = twin(weights, gradients, lrs, **{k: v for k, v in options.items() if k != "capturable"})
    for kernel in ("fused", "foreach"):
        params = parameters(weights)
        assert_equal(train(kind(params, 1.0, kernel=kernel, **options), params, gradients, lrs), expected)


@each
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(kind, options, kernel, dtype):
    weights, gradients = problem(20, dtype=dtype)
    params = parameters(weights)
    ours = train(kind(params, 1.0, kernel=kernel, **options), params, gradients, rates(20, 0.02))
    twin = lars_twin if kind is LARS else lamb_twin
    options = {k: v for k, v in options.items() if k != "capturable"}
    wide = twin([w.double() for w in weights], [[g.double() for g in gradient] for gradient in gradients],
                rates(20, 0.02), **options)  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_equal([p.double() for p in ours], wide, tolerance)


class _Devices(TorchDispatchMode):
    """Notes each copy from one device to another."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.copies += args[0].device != result.device
        return result


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_a_step_on_a_gpu_reads_nothing_on_the_host(kind, options, dtype, low_precision):
    """Fake CUDA tensors have no values: any read of one on the host, or branch on it, raises."""
    capturable = options.get("capturable", True)
    with FakeTensorMode() as fake:
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)) for shape in ((3, 2), (4,), ())]
        optimizer = kind(params, 0.1, low_precision=low_precision, **options)
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        with _Devices() as devices:
            optimizer.step()
        assert fake is not None
        assert all(s.device.type == "cuda" for p in params for k, s in optimizer.state[p].items() if k != "step")
        if kind is LARS or (capturable and "capturable" in options):
            assert devices.copies == 0


class _Fresh(TorchDispatchMode):
    """The most elements of a tensor that an operation makes, as opposed to writes to or views."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info is None for r in func._schema.returns):
            made = result if isinstance(result, (tuple, list)) else [result]
            sizes = [t.numel() for t in made if isinstance(t, torch.Tensor) and t.device.type != "meta"]
            self.largest = max([self.largest, *sizes])
        return result


@each
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_large_is_allocated_after_the_first_step(kind, options, kernel, dtype):
    """One parameter needs its gradient laid out anew, one its weights. What is allocated is a chunk at most."""
    shapes = [((2, CHUNK), "plain"), ((1100, 1000), "transposed"), ((1100, 1000), "strided")]
    params = parameters(list(_layouts(shapes, torch.Generator().manual_seed(0), dtype)))
    optimizer = kind(params, 0.1, kernel=kernel, **options)
    for p in params:
        p.grad = torch.ones(p.shape, dtype=dtype)
    largest = []
    for _ in range(3):
        with _Fresh() as fresh:
            optimizer.step()
        largest.append(fresh.largest)
    assert largest[0] > CHUNK >= max(largest[1:])


@each
@both
def test_float32_is_right_to_a_millionth_after_100_steps(kind, options, kernel):
    shapes = ((30, 40), (7,), (3, 2, 5, 5), (64, 64), (1,))
    weights, gradients = problem(100, shapes=shapes, dtype=torch.float32)
    twin = lars_twin if kind is LARS else lamb_twin
    params = parameters(weights)
    ours = train(kind(params, 1.0, kernel=kernel, **options), params, gradients, rates(100, 0.02))
    options = {k: v for k, v in options.items() if k != "capturable"}
    wide = twin([w.double() for w in weights], [[g.double() for g in gradient] for gradient in gradients],
                rates(100, 0.02), **options)  # fmt: skip
    for a, b in zip(ours, wide, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@each
def test_the_cpu_is_fused_unless_asked_otherwise_and_a_gpu_never_is(kind, options, monkeypatch):
    seen = []
    monkeypatch.setattr(kind, "_fused", lambda self, bucket: seen.append("fused"))
    monkeypatch.setattr(kind, "_foreach", lambda self, bucket: iter(seen.append("foreach") or ()))
    for kernel in ("auto", "fused", "foreach"):
        p = parameters([torch.ones(2)])[0]
        optimizer = kind([p], 0.1, kernel=kernel, **{**options, "prenormalize": False} if kind is LAMB else options)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert seen == ["fused", "fused", "foreach"]
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(2, device="cuda"))
        with pytest.raises(ValueError, match=r"kernel = 'fused': .*params\[0\] of shape \(2,\) is on cuda"):
            kind([p], 0.1, kernel="fused", **options)
        optimizer = kind([p], 0.1, **options)
        p.grad = torch.empty_like(p)
        optimizer.step()
    assert seen[3:] == ["foreach"]


@each
def test_copies_and_pickles(kind, options):
    weights, gradients = problem(4)
    params = parameters(weights)
    optimizer = kind(params, 0.1, **options)
    train(optimizer, params, gradients[:2], [0.1] * 2)
    twin = copy.deepcopy(optimizer)
    others = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, gradients[2:], [0.1] * 2)
    train(twin, others, gradients[2:], [0.1] * 2)
    assert_equal(params, others, 0)


@each
def test_layers_of_many_chunks(kind, options, monkeypatch):
    """Sums over chunks, and small layers that are stepped together, at a chunk of four elements."""
    for module in (trust, lamb_module):
        monkeypatch.setattr(module, "CHUNK", 4)
    shapes = ((0,), (5, 3), (1,), (2,), (3,), (9,), (4,))
    weights, gradients = problem(6, shapes=shapes)
    twin = lars_twin if kind is LARS else lamb_twin
    expected = twin(weights, gradients, rates(6, 0.1), **{k: v for k, v in options.items() if k != "capturable"})
    params = parameters(weights)
    assert_equal(train(kind(params, 1.0, kernel="fused", **options), params, gradients, rates(6, 0.1)), expected)
