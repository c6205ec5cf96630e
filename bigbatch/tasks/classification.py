"""Image classification with any timm model, or with bigbatch's own small one."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigbatch.config.models import Classification
from bigbatch.spec import Spec

from .mlp import MLP
from .resnet_small import ResNetSmall

OWN: dict[str, type[MLP | ResNetSmall]] = {"bigbatch/mlp": MLP, "bigbatch/resnet_small": ResNetSmall}
LOADS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options by which timm would take weights from elsewhere."""


class ClassificationTask:
    """Cross entropy over K classes with label smoothing ε (Szegedy et al. 2016, arXiv:1512.00567):

    ℓ(label) = -Σₖ wₖ qₖ log pₖ, qₖ = (1 - ε)·[k = label] + ε/K.

    A sample weighs w_label. Without ``class_weights`` every w is 1; with them and ε it is torch's definition: a
    class's weight multiplies its own term of the sum, and Σ w_label divides. A mixed sample, with ``label2`` and
    ``share`` s, has the loss s·ℓ(label) + (1 - s)·ℓ(label2), and the weight likewise. A window of weight 0 has no
    finite gradient, so its step is skipped.

    Metrics, without smoothing and weights: ``loss``, the mean cross entropy, and ``accuracy``, from 0 to 1.

    Raises ValueError if there is not one class weight for each class, or all are 0.
    """

    sums = ("loss", "correct", "weight")
    metric_names = ("loss", "accuracy")

    def __init__(self, config: Classification, spec: Spec) -> None:
        weights, classes = config.class_weights, spec.classes
        if weights is not None and (len(weights) != classes or not any(weights)):
            found = f"{len(weights)} weights for {classes} classes" if len(weights) != classes else "nothing weighs"
            raise ValueError(
                f"task.class_weights = {list(weights)}: {found}; give one for each class, some above 0, or remove it"
            )
        self.config, self.shape, self.classes = config, spec.shape, classes

    @property
    def weight_is_count(self) -> bool:
        return self.config.class_weights is None

    def build_model(self) -> nn.Module:
        """The model of ``task.model`` with ``task.options``, tried on one blank image.

        Raises ValueError if the name is unknown, or if the model rejects the options or images of this shape.
        """
        config = self.config
        self._check_name()
        try:
            model = self._build()
        except Exception as error:
            key, value = ("options", config.options) if config.options else ("model", config.model)
            raise ValueError(
                f"task.{key} = {value!r}: {config.model} cannot be built with these options for {self.shape[0]} "
                f"channels and {self.classes} classes ({error}); change task.options"
            ) from error
        self._try(model)
        return model.to(memory_format=torch.channels_last) if config.channels_last else model

    def pretrained(self) -> dict[str, Tensor]:
        """timm's weights of that name, from its hub or what is kept of it, fitted to the images' channels."""
        import timm
        from huggingface_hub import hf_hub_download

        name, what = self.config.model.removeprefix("timm/"), f"task.weights = pretrained: {self.config.model}"
        found = timm.get_pretrained_cfg(name)
        assert found is not None  # since the name has been checked
        file = found.hf_hub_filename or "model.safetensors"
        if not found.hf_hub_id or not file.endswith(".safetensors"):
            raise ValueError(f"{what} has no weights as safetensors on its hub; choose another, or give a file")
        try:
            overlay = {"file": hf_hub_download(found.hf_hub_id, file), "custom_load": False}
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=self.shape[0], **self.config.options
            )
        except Exception as error:  # of the network, of a damaged file, of a stem that cannot be fitted
            raise ValueError(f"{what}: its weights cannot be had ({error}); fetch them, or give a file") from error
        return model.state_dict()

    def _check_name(self) -> None:
        name, pretrained = self.config.model, self.config.weights == "pretrained"
        if loads := [key for key in LOADS if key in self.config.options]:
            raise ValueError(f"task.options.{loads[0]}: some timm would run code of what it names; use task.weights")
        if len(self.shape) == 1 and name != "bigbatch/mlp":
            raise ValueError(
                f"task.model = {name!r}: takes images, and data.preprocess.whiten = pca gives vectors of "
                f"{self.shape[0]}; use bigbatch/mlp, or zca"
            )
        if name in OWN and pretrained:
            raise ValueError(f"task.weights = pretrained: {name} has none; give a run, a checkpoint or a file")
        if name in OWN:
            return
        import timm  # slow to import, and not needed by our own models

        short = name.removeprefix("timm/")
        # a tag after a dot names pretrained weights
        known = timm.is_model_pretrained(short) if pretrained else "." not in short and timm.is_model(short)
        if not name.startswith("timm/") or not known:
            others = timm.list_pretrained() if pretrained else timm.list_models()
            names = [*OWN, *(f"timm/{other}" for other in others)]
            close = ", ".join(get_close_matches(name, names)) or f"{', '.join(OWN)} or timm/NAME"
            raise ValueError(f"task.model = {name!r}: unknown; did you mean {close}? timm.list_models() names the rest")

    def _build(self) -> nn.Module:
        name, options = self.config.model, self.config.options
        if name in OWN:
            return OWN[name](shape=self.shape, classes=self.classes, **options)
        import timm

        channels, name = self.shape[0], name.removeprefix("timm/")
        return timm.create_model(name, pretrained=False, in_chans=channels, num_classes=self.classes, **options)

    def _try(self, model: nn.Module) -> None:
        model.eval()
        try:
            with torch.no_grad():
                logits = model(torch.zeros(1, *self.shape))
        except Exception as error:
            size = " × ".join(map(str, self.shape))
            raise ValueError(
                f"task.model = {self.config.model!r} with task.options = {self.config.options!r}: does not take images "
                f"of {size} ({error}); choose another model, or options that fit (many take img_size)"
            ) from error
        model.train()
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (1, self.classes):
            raise ValueError(
                f"task.options = {self.config.options!r}: {self.config.model} gives {found} for one image, not "
                f"{(1, self.classes)} logits; remove the options that change its output"
            )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        smoothing, logits = self.config.label_smoothing, self._logits(model, batch)
        weight = self._class_weights(logits)
        if "share" in batch:
            first, second = (
                F.cross_entropy(logits, batch[name], weight=weight, reduction="none", label_smoothing=smoothing)
                for name in ("label", "label2")
            )
            loss = (batch["share"] * first + (1 - batch["share"]) * second).sum()
        else:
            loss = F.cross_entropy(logits, batch["label"], weight=weight, reduction="sum", label_smoothing=smoothing)
        return loss, self._weight(batch)

    def _weight(self, batch: dict[str, Tensor]) -> Tensor:
        image, label = batch["image"], batch["label"]
        dtype = torch.promote_types(image.dtype, torch.float32)
        weight = self._class_weights(torch.empty((), dtype=dtype, device=image.device))
        if weight is None:
            return torch.full((), len(image), dtype=dtype, device=image.device)
        if "share" in batch:
            return (batch["share"] * weight[label] + (1 - batch["share"]) * weight[batch["label2"]]).sum()
        return weight[label].sum()

    def _class_weights(self, like: Tensor) -> Tensor | None:
        weights = self.config.class_weights
        return None if weights is None else like.new_tensor(weights)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss, correct answers and their number; the caller has put the model in the mode it wants."""
        logits, label = self._logits(model, batch).double(), batch["label"]
        return {
            "loss": F.cross_entropy(logits, label, reduction="sum"),
            "correct": (logits.argmax(1) == label).sum().double(),
            "weight": logits.new_full((), len(label)),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["weight"], "accuracy": sums["correct"] / sums["weight"]}

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        image = batch["image"]
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        logits: Tensor = model(image)
        # a loss summed up in half precision would be off
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
