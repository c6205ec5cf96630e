"""Language modelling with any model that transformers can build for it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigbatch.config.models import CausalLM, MaskedLM
from bigbatch.spec import IGNORED, Spec

PREFIX = "transformers/"
HEADS = ("cls", "lm_head", "predictions")
"""Where transformers keeps the layers from a hidden state to the vocabulary, of BERT's and many other models."""
ROLES = {"pad": "pad", "bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "mask": "mask"}
"""Which of the data's special tokens a model's configuration asks for under which name."""


class LanguageTask:
    """Cross entropy of tokens to predict, their number as weight; metrics ``loss``, its mean, ``perplexity``,
    exp(loss), and ``accuracy``, the share of tokens whose most likely one is right.

    masked_lm: the tokens with a label, from all tokens around them. The model's head sees these alone where it can.
    causal_lm: every token but the first, and no padding, from those before it in its row: of a packed row also from
    those of other documents, as GPT-3 has it (Brown et al. 2020, arXiv:2005.14165).
    """

    sums = ("loss", "correct", "weight")
    metric_names = ("loss", "perplexity", "accuracy")
    weight_is_count = False

    def __init__(self, config: MaskedLM | CausalLM, spec: Spec) -> None:
        if len(spec.shape) != 1:
            raise ValueError(f"task.name = {config.name!r}: the data is not rows of tokens; set data.name=text")
        self.config, self.spec = config, spec
        self._where: Tensor | None = None

    def build_model(self) -> nn.Module:
        """The model of ``task.model``, with the data's vocabulary and special tokens, tried on one row.

        Raises ValueError if the type or an option is unknown, if they do not go together or with the data, or if the
        model of a causal_lm sees the tokens that it is to predict.
        """
        masked, kind, settings = self.config.name == "masked_lm", self._kind(), self._settings()
        try:
            model: nn.Module = kind.from_config(settings)
            self._try(model.eval())
        except Exception as error:
            what = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{self.config.what}: {what}; change the model or task.options") from error
        head = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
        if masked and head is not None:
            head.register_forward_pre_hook(self._narrow)
        return model.train()

    def pretrained(self) -> dict[str, Tensor]:
        """Those of a name on the hub or of a folder, as safetensors; what they lack is left out."""
        what = f"task.weights = pretrained: {self.config.model}"
        try:
            model, found = self._kind().from_pretrained(
                self.config.model.removeprefix(PREFIX),
                config=self._settings(),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # of the network, of files, of another vocabulary
            raise ValueError(
                f"{what} cannot be had for this vocabulary of {self.spec.classes} ({error}); set data.tokenizer.path "
                "to the model's own, and see that it has safetensors"
            ) from error
        return {name: tensor for name, tensor in model.state_dict().items() if name not in found["missing_keys"]}

    def _kind(self) -> Any:
        try:
            from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        except ImportError as error:
            raise ValueError(f"task.model: transformers is missing ({error}); pip install 'bigbatch[text]'") from None
        return AutoModelForMaskedLM if self.config.name == "masked_lm" else AutoModelForCausalLM

    def _settings(self) -> Any:
        """The configuration, from the type's own or that of pretrained weights, the data and the options."""
        from transformers import AutoConfig

        config, ids, make = self.config, self.spec.special, AutoConfig.for_model
        name, form = config.model.removeprefix(PREFIX), f"{PREFIX}TYPE, such as {PREFIX}bert"
        if config.weights == "pretrained":
            make = partial(AutoConfig.from_pretrained, trust_remote_code=False)
            form = f"{PREFIX}NAME of the hub, or a folder's"
        try:
            default = make(name)
        except (OSError, ValueError, KeyError) as error:
            message = str(error).partition(". Should")[0]
            raise ValueError(f"task.model = {config.model!r}: unknown ({message}); write {form}") from None
        given: dict[str, Any] = {"vocab_size": self.spec.classes, "use_cache": False}
        given |= {f"{name}_token_id": ids.get(role) for name, role in ROLES.items()}
        for key in config.options:
            if key in given or not hasattr(default, key):
                why = "follows from the data" if key in given else f"no option of {name}"
                raise ValueError(f"task.options.{key} = {config.options[key]!r}: {why}; remove it")
        try:
            return make(name, **{k: v for k, v in given.items() if hasattr(default, k)}, **config.options)
        except Exception as error:  # the library checks some options' types, with exceptions of its own
            raise ValueError(f"{config.what}: {error}; change task.options") from error

    @torch.no_grad()
    def _try(self, model: nn.Module) -> None:
        (length,) = self.spec.shape
        tokens = torch.zeros(2, length, dtype=torch.int64)
        tokens[1, -1] = 1
        try:
            logits = model(input_ids=tokens).logits
        except Exception as error:  # each model has its own
            what = f"does not take rows of data.length = {length} ({error!r}; many have max_position_embeddings)"
            raise ValueError(what) from error
        if logits.shape != (2, length, self.spec.classes):
            raise ValueError(f"gives {tuple(logits.shape)} for two rows of {length} of {self.spec.classes} tokens")
        seen = (logits[0] - logits[1])[:-1].abs().max() > 1e-5 * logits.abs().max()  # more than rounding
        if self.config.name == "causal_lm" and seen:
            raise ValueError("sees the tokens that a causal_lm predicts (BERT's kind needs is_decoder: true)")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = self._predict(model, batch)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return loss, loss.new_tensor(len(labels))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss, right tokens and their number; the caller has put the model in the mode it wants."""
        logits, labels = self._predict(model, batch)
        logits = logits.double()
        loss, right = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
        return {"loss": loss, "correct": right.double(), "weight": loss.new_tensor(len(labels))}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss, accuracy = (sums[name] / sums["weight"] for name in ("loss", "correct"))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}

    def _predict(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, V), in float32 at least, and labels (n,) of the n tokens to predict."""
        tokens, attends = batch["input_ids"], batch.get("attention_mask")
        if self.config.name == "masked_lm":
            labels, where = batch["labels"], batch["labels"] != IGNORED
        else:
            labels = tokens.roll(-1, dims=1)
            where = torch.ones_like(tokens, dtype=torch.bool) if attends is None else attends.bool().roll(-1, dims=1)
            where[:, -1] = False
        self._where = where
        try:
            logits = model(input_ids=tokens, attention_mask=attends).logits
        finally:
            self._where = None
        logits = logits if logits.dim() == 2 else logits[where]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[where]

    def _narrow(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Of the hidden states before the head, only those of tokens to predict: its logits are most of a step."""
        hidden, *others = inputs
        return None if self._where is None else (hidden[self._where], *others)
