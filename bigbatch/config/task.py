"""Tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from .section import Fraction1, Rate, Section


class _Task(Section):
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the model.")
    dropout: Literal["keyed", "torch"] = Field(
        "keyed",
        description="Masks drawn from (seed, step, position in the global batch), the same in every layout; or torch's "
        "own, which depend on the micro batch and keep attention fused.",
    )
    weights: str | None = Field(
        None,
        description="To start from: a checkpoint or run directory, a .safetensors file, or `pretrained` for those that "
        "the model's name stands for.",
    )
    head: Literal["keep", "replace"] = Field("keep", description="Of the weights: the last layer too, or a new one.")
    freeze: tuple[str, ...] = Field((), description="Regular expressions of parameters that stay as they are.")

    @field_validator("head")
    @classmethod
    def _of_weights(cls, head: str, info: ValidationInfo) -> str:
        if head == "replace" and info.data.get("weights") is None:
            raise ValueError("every run without task.weights has a new one; set task.weights, or leave it out")
        return head

    @property
    def what(self) -> str:
        """The model as an error message has it."""
        return f"task.model = {getattr(self, 'model', None)!r} with task.options = {self.options!r}"


class Classification(_Task):
    name: Literal["classification"]
    model: str = Field(min_length=1, description="`bigbatch/resnet_small`, `bigbatch/mlp` or `timm/NAME`.")
    label_smoothing: Fraction1 = 0.0
    class_weights: tuple[Rate, ...] | None = Field(None, description="A weight for each class; default: 1.")
    channels_last: bool = False


class _Language(_Task):
    model: str = Field(
        min_length=1, description="`transformers/TYPE`, such as bert, built of options; or with weights, a hub name."
    )


class MaskedLM(_Language):
    name: Literal["masked_lm"]


class CausalLM(_Language):
    name: Literal["causal_lm"]


class CustomTask(_Task):
    """Your own: ``target(spec, **options)``, of the dataset's `Spec`, gives a `bigbatch.tasks.Task`."""

    name: Literal["custom"]
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Name; runs only with --allow-custom.")

    @property
    def what(self) -> str:
        return f"task.target = {self.target!r} with task.options = {self.options!r}"


Task = Annotated[Classification | MaskedLM | CausalLM | CustomTask, Field(discriminator="name")]
