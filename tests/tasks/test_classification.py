from __future__ import annotations

import math
import sys

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigbatch.config.models import Classification
from bigbatch.spec import Spec
from bigbatch.tasks import ResNetSmall, build_task

OWN = "bigbatch/resnet_small"


def task(model=OWN, *, shape=(1, 8, 8), classes=10, **config):
    return build_task(Classification(name="classification", model=model, **config), Spec(shape, classes))


class Table(nn.Module):
    """Logits that were written down before; an image holds the number of its row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits[image[:, 0, 0, 0].long()]


def numbered(labels, dtype=torch.float64):
    n = len(labels)
    return {"image": torch.arange(n).to(dtype).view(n, 1, 1, 1), "label": torch.as_tensor(labels)}


# ------------------------------------------------------------------------------------------ loss, metrics


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_loss_is_the_formula(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 10, dtype=torch.float64), [3, 0, 9, 9, 1, 5]
    loss, weight = task(label_smoothing=smoothing).loss(Table(logits), numbered(labels))
    expected = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        total = sum(math.exp(z) for z in row)
        for k, z in enumerate(row):
            q = (1 - smoothing) * (k == label) + smoothing / 10
            expected -= q * math.log(math.exp(z) / total)
    assert loss.shape == weight.shape == () and weight.dtype == loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert float(weight) == 6


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.sampled_from([0.0, 0.1]))
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(sizes, smoothing):
    n = sum(sizes)
    torch.manual_seed(n)
    whole, parts = (Table(torch.randn(n, 10, dtype=torch.float64)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    batch, judge = numbered([i * 7 % 10 for i in range(n)]), task(label_smoothing=smoothing)

    loss, weight = judge.loss(whole, batch)
    (loss / weight).backward()
    pieces = [
        dict(zip(batch, split, strict=True)) for split in zip(*(t.split(sizes) for t in batch.values()), strict=True)
    ]
    global_weight = sum(judge._weight(piece) for piece in pieces)
    total = 0.0
    for piece in pieces:
        part, part_weight = judge.loss(parts, piece)
        assert torch.equal(part_weight, judge._weight(piece))
        (part / global_weight).backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(parts.logits.grad, whole.logits.grad, rtol=1e-12, atol=1e-14)

    sums = [judge.evaluate(parts, piece) for piece in pieces]
    joined = judge.metrics({name: sum(float(s[name]) for s in sums) for name in sums[0]})
    at_once = judge.metrics({name: float(value) for name, value in judge.evaluate(whole, batch).items()})
    assert joined == pytest.approx(at_once, rel=1e-12)


WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 0.25, 1.0, 1.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_weights_and_mixing_are_the_formula(smoothing, weights):
    torch.manual_seed(0)
    logits, labels, others = torch.randn(5, 10, dtype=torch.float64), [3, 0, 2, 9, 1], [0, 2, 2, 4, 1]
    share = torch.tensor([0.25, 1.0, 0.5, 0.0, 0.7], dtype=torch.float64)
    judge, w = task(label_smoothing=smoothing, class_weights=weights), weights or [1.0] * 10
    log_p = logits.log_softmax(1).tolist()

    def entropy(i, label):
        return -sum(w[k] * ((1 - smoothing) * (k == label) + smoothing / 10) * log_p[i][k] for k in range(10))

    plain = numbered(labels)
    mixed = {**plain, "label2": torch.tensor(others), "share": share}
    expected = [(entropy(i, a), w[a]) for i, a in enumerate(labels)]
    blended = [
        (s * entropy(i, a) + (1 - s) * entropy(i, b), s * w[a] + (1 - s) * w[b])
        for i, (a, b, s) in enumerate(zip(labels, others, share.tolist(), strict=True))
    ]
    for batch, pairs in ((plain, expected), (mixed, blended)):
        loss, weight = judge.loss(Table(logits), batch)
        assert (loss.item(), weight.item()) == pytest.approx(tuple(map(sum, zip(*pairs, strict=True))), rel=1e-12)
        assert torch.equal(weight, judge._weight(batch)) and weight.dtype == torch.float64
    assert judge.weight_is_count is (weights is None)
    if weights:
        mean = nn.functional.cross_entropy(logits, plain["label"], torch.tensor(w).double(), label_smoothing=smoothing)
        loss, weight = judge.loss(Table(logits), plain)
        torch.testing.assert_close(loss / weight, mean, rtol=1e-12, atol=0)
    sums, even = (some.evaluate(Table(logits), plain) for some in (judge, task()))
    assert sums == even


@pytest.mark.parametrize(
    ("weights", "reason"),
    [([1.0] * 9, "9 weights for 10 classes"), ([], "0 weights for 10 classes"), ([0.0] * 10, "nothing weighs")],
)
def test_class_weights_that_do_not_fit(weights, reason):
    with pytest.raises(ValueError, match=rf"task\.class_weights = \[.*\]: {reason}; give one for each class"):
        task(class_weights=weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_evaluation_is_without_smoothing_and_in_float64(dtype):
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 4.0]], dtype=dtype)
    sums = task(classes=3, label_smoothing=0.5).evaluate(Table(logits), numbered([0, 1, 2, 2], dtype))
    assert all(s.dtype == torch.float64 and s.shape == () and not s.requires_grad for s in sums.values())
    expected = -sum(logits.double().log_softmax(1)[i, k] for i, k in enumerate([0, 1, 2, 2]))
    torch.testing.assert_close(sums["loss"], expected, rtol=1e-12, atol=0)
    assert (float(sums["correct"]), float(sums["weight"])) == (3, 4)
    metrics = task().metrics({name: float(value) for name, value in sums.items()})
    assert metrics == {"loss": pytest.approx(float(expected) / 4), "accuracy": 0.75}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_sums_are_never_in_half_precision(dtype, wide):
    judge = task(classes=3)
    loss, weight = judge.loss(Table(torch.randn(300, 3, dtype=dtype)), numbered([0] * 300, torch.float64) | {
        "image": torch.zeros(300, 1, 1, 1, dtype=dtype)})  # fmt: skip
    assert loss.dtype == weight.dtype == wide
    assert float(weight) == 300
    assert judge.weight_is_count


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("model", [OWN, "timm/resnet18", "timm/mobilenetv3_small_050"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_models_are_built_for_the_data_and_from_the_seed(model, shape):
    judge = task(model, shape=shape, classes=6)
    torch.manual_seed(3)
    one = judge.build_model()
    after = torch.rand(())
    torch.manual_seed(3)
    other = judge.build_model()
    assert torch.equal(torch.rand(()), after)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert one.training and all(m.training for m in one.modules())
    loss, _ = judge.loss(one, {"image": torch.randn(2, *shape), "label": torch.tensor([0, 5])})
    loss.backward()
    assert all(p.grad is not None for p in one.parameters())


def test_trying_the_model_leaves_no_trace():
    state = task("timm/resnet18").build_model().state_dict()
    assert all(
        not value.any() for name, value in state.items() if name.endswith(("running_mean", "num_batches_tracked"))
    )


def test_timm_parameter_count_is_the_published_one():
    model = task("timm/resnet18", shape=(3, 64, 64), classes=1000).build_model()
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


def test_options_reach_the_model():
    assert task(options={"widths": [4, 8]}).build_model().head.in_features == 8
    assert task("timm/resnet18", options={"drop_rate": 0.25}).build_model().drop_rate == 0.25


def test_own_model_needs_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert isinstance(task().build_model(), ResNetSmall)


@pytest.mark.parametrize("model", [OWN, "timm/resnet18"])
def test_channels_last_changes_layout_and_nothing_else(model):
    plain, last = task(model, shape=(3, 16, 16)), task(model, shape=(3, 16, 16), channels_last=True)
    torch.manual_seed(0)
    one = plain.build_model().double()
    torch.manual_seed(0)
    other = last.build_model().double()
    convolutions = [m.weight for m in other.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    batch = {"image": torch.randn(4, 3, 16, 16, dtype=torch.float64), "label": torch.tensor([0, 1, 2, 3])}
    seen = []
    other.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    torch.testing.assert_close(last.loss(other, batch)[0], plain.loss(one, batch)[0], rtol=1e-10, atol=0)
    assert seen == [(3 * 16 * 16, 1, 3 * 16, 3)]


def test_every_timm_name_passes_the_check():
    for name in timm.list_models():
        task(f"timm/{name}")._check_name()


@pytest.mark.parametrize(
    ("model", "close"),
    [
        ("timm/resnet_18", "timm/resnet18"),
        ("resnet18", "timm/resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18"),
        ("resnet_small", OWN),
        ("bigbatch/resnet-small", OWN),
        ("timm/hf-hub:somebody/model", "timm/"),
        ("qqq", "bigbatch/resnet_small or timm/NAME"),
    ],
)
def test_unknown_model_names_the_likely_ones(model, close):
    with pytest.raises(ValueError, match=rf"task\.model = '{model}': unknown; did you mean .*{close}"):
        task(model).build_model()


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("timm/resnet18", {"wings": 2}, "unexpected keyword argument 'wings'"),
        ("timm/resnet18", {"num_classes": 3}, "multiple values for keyword argument 'num_classes'"),
        ("timm/resnet18", {"pretrained": True}, "multiple values for keyword argument 'pretrained'"),
        ("timm/resnet18", {"features_only": True}, r"gives list for one image, not \(1, 10\) logits"),
        (OWN, {"width": [4]}, "unexpected keyword argument 'width'"),
        (OWN, {"widths": [0]}, r"widths = \[0\]: give the channels of each stage"),
        (OWN, {"classes": 3}, "multiple values for keyword argument 'classes'"),
    ],
)
def test_options_the_model_rejects(model, options, reason):
    with pytest.raises(ValueError) as error:
        task(model, options=options).build_model()
    message = str(error.value)
    assert message.startswith(f"task.options = {options!r}: {model}")
    error.match(reason)


def test_images_the_model_does_not_take():
    name = "timm/vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=r"task\.model = .* does not take images of 1 × 28 × 28 \(.*img_size"):
        task(name, shape=(1, 28, 28)).build_model()
    small = {"img_size": 28, "patch_size": 7, "depth": 1}
    assert task(name, shape=(1, 28, 28), options=small).build_model()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
