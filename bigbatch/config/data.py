"""Datasets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from .section import Positive, Rate, Section

Transform = str | dict[str, dict[str, Any]]
Source = Annotated[tuple[str, ...], Field(min_length=1)] | str
Share = Annotated[float, Field(gt=0, lt=1)]
Share01 = Annotated[float, Field(ge=0, le=1)]


class Augment(Section):
    """Random changes of training images, drawn from (seed, epoch, sample)."""

    shift: Annotated[int, Field(ge=0)] = Field(0, description="Largest shift in pixels, each axis.")
    flip: bool = Field(False, description="Left-right flip of half the samples.")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Probability of erasing a random rectangle.")
    mixup: Rate = Field(0.0, description="α of mixup, 0 for none (arXiv:1710.09412); with cutmix too, one of the two.")
    cutmix: Rate = Field(0.0, description="α of CutMix, 0 for none (arXiv:1905.04899).")


class Preprocess(Section):
    """What is done to every image, by statistics of the training part alone: rescale, centre, scale, whiten."""

    rescale: Literal["unit", "symmetric", "minmax"] = Field(
        "unit", description="To [0, 1] or [-1, 1] by what a pixel can be; or to [0, 1] by the training part's extremes."
    )
    center: Literal["none", "all", "channel", "feature"] = Field(
        "channel", description="Mean subtracted, over what; default with whitening: feature."
    )
    scale: Literal["none", "all", "channel", "feature"] = Field(
        "channel", description="Standard deviation divided by, over what."
    )
    whiten: Literal["none", "pca", "zca"] = Field("none", description="After that; pca gives vectors, not images.")
    eps: Rate = Field(1e-5, description="Added to the eigenvalues that whitening divides by.")
    keep: Annotated[int, Field(gt=0, strict=True)] | Share | None = Field(
        None, description="Components kept by whitening, or their share of the variance; default: all that vary."
    )
    samples: Positive | Literal["all"] = Field("all", description="Training samples that statistics are taken from.")

    @model_validator(mode="after")
    def _some_statistics(self) -> Preprocess:
        none = self.rescale != "minmax" and self.center == self.scale == self.whiten == "none"
        if none and self.samples != "all":
            raise ValueError("samples: nothing here needs statistics; leave it out, or set center, scale or whiten")
        return self

    @model_validator(mode="before")
    @classmethod
    def _center_by_feature(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("whiten", "none") != "none":
            return {"center": "feature", **values}
        return values

    @field_validator("whiten")
    @classmethod
    def _centred(cls, whiten: str, info: ValidationInfo) -> str:
        # Else what is left of the mean is divided by the least deviations there are.
        if whiten != "none" and info.data.get("center", "feature") != "feature":
            raise ValueError("is for what is centred by feature; set data.preprocess.center=feature or leave it out")
        return whiten

    @field_validator("eps", "keep")
    @classmethod
    def _for_whitening(cls, value: float | None, info: ValidationInfo) -> float | None:
        assert info.field_name
        if info.data.get("whiten") == "none" and value != cls.model_fields[info.field_name].default:
            raise ValueError("is for whitening; set data.preprocess.whiten, or leave it out")
        return value


class _Data(Section):
    last: Literal["cross", "short", "drop"] = Field("cross", description="What becomes of an epoch's last window.")
    shuffle: Positive | Literal["all"] = Field(
        "all",
        description="Samples that are shuffled among each other: all, or windows of so many consecutive ones, the "
        "windows in random order too (for shards that are read as a stream).",
    )
    size: Positive | None = Field(None, description="Training samples, where the data is not at hand to count.")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="Processes beside each that read ahead for it.")
    prefetch: Positive = Field(2, description="Micro batches that they are ahead.")


class _Images(_Data):
    augment: Augment = Field(default_factory=lambda: Augment())
    preprocess: Preprocess = Field(default_factory=lambda: Preprocess())
    transforms: tuple[Transform, ...] = Field(
        (), description="torchvision.transforms.v2 of training images, by name, with arguments: {RandAugment: {}}."
    )
    eval_transforms: tuple[Transform, ...] = Field((), description="Those of all other images.")

    @field_validator("preprocess")
    @classmethod
    def _vectors_do_not_mix(cls, preprocess: Preprocess, info: ValidationInfo) -> Preprocess:
        augment = info.data.get("augment")
        if preprocess.whiten == "pca" and augment and (augment.mixup or augment.cutmix):
            raise ValueError("pca gives vectors, and data.augment.mixup and cutmix mix images; use zca, or mix none")
        return preprocess


class Digits(_Images):
    name: Literal["digits"]


class Idx(_Images):
    name: Literal["idx"]
    path: Source = Field(description="Folder of the four idx files; of several, the first that has them.")
    validation: Positive = Field(5000, description="Training images at the end that validate.")
    download: Literal["fashion_mnist", "mnist"] | None = Field(None, description="Fetch into the first path.")


class Synthetic(_Images):
    name: Literal["synthetic"]
    size: Positive = 1024
    shape: tuple[Positive, Positive, Positive] = Field((3, 32, 32), description="Channels, height, width.")
    classes: Annotated[int, Field(gt=1, le=2**20)] = 10
    evaluation: Positive = Field(256, description="Samples of the validation and of the test part.")


class _Files(_Images):
    """Images that are decoded when they are read."""

    shape: tuple[Literal[1, 3], Positive, Positive] = Field(
        (3, 224, 224), description="Channels, height and width of what the model gets."
    )
    transforms: tuple[Transform, ...] | None = Field(  # type: ignore[assignment]
        None, description="As above; default: RandomResizedCrop to the shape."
    )
    eval_transforms: tuple[Transform, ...] | None = Field(  # type: ignore[assignment]
        None, description="As above; default: Resize to 8/7 of the shape (a square's shorter side), CenterCrop."
    )
    unreadable: Literal["fail", "skip"] = Field(
        "fail", description="An image that cannot be read ends the run, or is counted, named and replaced by another."
    )
    workers: Annotated[int, Field(ge=0, le=256)] = 4
    validation: Share | str = Field(description="Where validation images are; or a share of the training ones.")
    test: str | None = Field(None, description="Where test images are; default: the validation images once more.")


class Folder(_Files):
    """One folder for each class, of JPEG, PNG or other images; their names in order are the labels."""

    name: Literal["folder"]
    path: str = Field(description="Folder that the others are in.")
    train: str = "train"
    validation: Share | str = "val"


class Shards(_Files):
    """Tar files as WebDataset has them: members of one sample share a name, .jpg or .png and .cls beside each other."""

    name: Literal["shards"]
    train: Source = Field(description="Paths, globs, braces ({000..146}) or URLs of tar files.")
    validation: Share | Source  # type: ignore[assignment]
    test: Source | None = None  # type: ignore[assignment]
    cache: str = Field("~/.cache/bigbatch", description="Folder that shards with a URL are fetched to.")
    cache_bytes: Positive | None = Field(None, description="Most bytes kept there, besides what processes have open.")


def _hub(name: str) -> str:
    # The library's other builders of one name are of no use here, and some versions' read pickles.
    if "/" not in name and name not in ("arrow", "imagefolder", "parquet", "webdataset"):
        raise ValueError(
            f"{name}: is no NAMESPACE/NAME on the hub and no folder such as ./{name}, nor arrow, imagefolder, parquet "
            "or webdataset for files; write one of them"
        )
    return name


HubName = Annotated[str, AfterValidator(_hub)]


class Hub(_Files):
    """A dataset of the Hugging Face library: a name on its hub, or local Parquet or Arrow files."""

    name: Literal["hub"]
    path: HubName = Field(description="Name on the hub, a folder saved by the library, or `parquet`, `arrow`.")
    files: dict[Literal["train", "validation", "test"], Source] | None = None
    config: str | None = Field(None, description="Configuration of a dataset that has several.")
    revision: str | None = None
    train: str = "train"
    validation: Share | str = "validation"
    image: str = "image"
    label: str = "label"


class Tokenizer(Section):
    path: str | None = Field(None, description="tokenizer.json, or a folder that has one; default: train one.")
    kind: Literal["wordpiece", "bpe"] = Field("wordpiece", description="To train: as BERT's, or as GPT-2's.")
    vocabulary: Annotated[int, Field(ge=8, le=2**20)] = 8192
    lowercase: bool = Field(True, description="Also take accents off letters (wordpiece).")

    @model_validator(mode="after")
    def _not_both(self) -> Tokenizer:
        given = [name for name in ("kind", "vocabulary", "lowercase") if getattr(self, name) != _default(self, name)]
        if self.path is not None and given:
            raise ValueError(f"{given[0]}: the tokenizer in {self.path} has its own; leave out one of the two")
        return self


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default


class Mask(Section):
    """Masked language modelling (Devlin et al. 2018, arXiv:1810.04805)."""

    probability: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Share of a row's tokens to predict.")
    replace: Share01 = Field(0.8, description="Of those, the share that becomes [MASK].")
    random: Share01 = Field(0.1, description="And the share that becomes a random token; the rest stays.")
    whole_word: bool = Field(False, description="Choose words, with all their tokens.")

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Mask:
        if self.replace + self.random > 1:
            raise ValueError(f"replace + random = {self.replace + self.random:g}: more than all; lower one of them")
        return self


class Text(_Data):
    """Documents of text, as rows of tokens.

    Names that end in .jsonl, .parquet and .arrow are tables of documents; all others are plain text, in UTF-8.
    """

    name: Literal["text"]
    train: Source | None = Field(None, description="Paths and globs; of a hub's dataset, its splits (default: train).")
    validation: Share | Source = Field(0.05, description="The same, or a share of the training documents.")
    test: Share | Source = Field(0.05, description="The same, or a share of the training documents.")
    hub: HubName | None = Field(None, description="Instead of files: a dataset's name on the hub, or its folder.")
    hub_config: str | None = Field(None, description="Configuration of a dataset that has several.")
    hub_revision: str | None = Field(None, description="Which state of it: a commit, or a tag.")
    field: str = Field("text", description="Column of a table that has the text.")
    document: Literal["line", "paragraph", "file"] = Field("line", description="What a text file is cut into.")
    tokenizer: Tokenizer = Field(default_factory=lambda: Tokenizer())
    length: Annotated[int, Field(ge=8, le=65536)] = Field(128, description="Tokens of a row.")
    packing: bool = Field(True, description="Fill rows with documents end to end; else one document a row, padded.")
    mask: Mask | None = Field(default_factory=lambda: Mask(), description="null for causal language modelling.")
    cache: str = Field("~/.cache/bigbatch", description="Folder that tokenised text is kept in.")

    @field_validator("hub_config", "hub_revision")
    @classmethod
    def _of_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("hub") is None:
            raise ValueError("is for a dataset of the hub; set data.hub, or leave it out")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Text:
        if (self.train or self.hub) is None:
            raise ValueError("train: give paths of text files, or data.hub")
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation + test = {sum(shares):g}: leave nothing to train on; lower them")
        return self


class CustomData(_Images):
    """Your own: ``target(seed=seed, **options)`` gives a `bigbatch.data.Dataset`, as large for every seed.

    With ``size`` a plan is made without it; else the plan loads it once more.
    """

    name: Literal["custom"]
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Name; runs only with --allow-custom.")
    options: dict[str, Any] = Field(default_factory=dict)


Data = Annotated[Digits | Idx | Synthetic | Folder | Shards | Hub | Text | CustomData, Field(discriminator="name")]
