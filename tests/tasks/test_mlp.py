from __future__ import annotations

import pytest
import torch

from bigbatch.tasks import MLP


@pytest.mark.parametrize(("shape", "widths"), [((12,), [5, 7]), ((1, 4, 3), [5, 7]), ((12,), [])])
def test_the_layers_are_those_of_the_options(shape, widths):
    model = MLP(shape=shape, classes=3, widths=widths, dropout=0.5).eval()
    images = torch.rand(6, *shape)
    expected = images.flatten(1)
    for layer in (each for each in model.layers if isinstance(each, torch.nn.Linear)):
        expected = (expected @ layer.weight.T + layer.bias).relu()
    torch.testing.assert_close(model(images), expected @ model.head.weight.T + model.head.bias)
    assert [weight.shape[0] for name, weight in model.named_parameters() if "weight" in name] == [*widths, 3]
    assert not torch.equal(model.train()(images), model(images)) or not widths


@pytest.mark.parametrize("widths", ["16", [8, 0], [8.5]])
def test_widths_that_make_no_network(widths):
    with pytest.raises(ValueError, match="widths = "):
        MLP(shape=(12,), classes=3, widths=widths)
