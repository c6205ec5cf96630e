"""A dataset and a task of your own: how far diabetes has advanced in a year, from ten measurements (scikit-learn's)."""

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from bigbatch.data import Batch, Dataset, TensorPart
from bigbatch.spec import Spec
from bigbatch.tasks import BaseTask


def patients(*, seed: int, test: float = 0.2) -> Dataset:
    x, y = map(torch.from_numpy, load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held = round(test * len(x))
    train, validation, rest = order.split([len(x) - 2 * held, held, held])
    x, y = x / x[train].std(0), (y - y[train].mean()) / y[train].std()
    parts = [TensorPart({"x": x[rows], "y": y[rows]}) for rows in (train, validation, rest)]
    return Dataset(*parts, Spec(shape=(x.shape[1],)), kind="plain")


class Regression(BaseTask):
    """Squared errors, and R² = 1 - Σ(ŷ-y)² / Σ(y-ȳ)² of sums alone, so that it is the same over any split."""

    sums, metric_names = ("loss", "weight", "y", "y²"), ("loss", "r2")

    def __init__(self, spec: Spec, width: int = 16) -> None:
        self.inputs, self.width = spec.shape[0], width

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.inputs, self.width), nn.ReLU(), nn.Linear(self.width, 1))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        errors = model(batch["x"])[:, 0] - batch["y"]
        return errors.square().sum(), errors.new_full((), len(errors))

    def evaluate(self, model: nn.Module, batch: Batch) -> Batch:
        y = batch["y"].double()
        return {**super().evaluate(model, batch), "y": y.sum(), "y²": y.square().sum()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        about_mean = sums["y²"] - sums["y"] ** 2 / sums["weight"]
        return {**super().metrics(sums), "r2": 1 - sums["loss"] / about_mean}
