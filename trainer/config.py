"""Settings of the trainer; `starcast config` prints them."""

import sys
from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from schemas.spans import Seconds

LEAST_ROWS = 50  # of which anything can be learnt

Method = Literal[
    "auto",
    "none",
    "frozen",
    "top_layers",
    "full",
    "lora",
    "adalora",
    "ia3",
    "adapters",
    "prefix",
    "prompt",
]
"""Which weights of an encoder are fitted with the star head; none: there is no head.

auto: all of them at a first fit; the head alone where a model in service has an encoder, for under
another one every item's text would have to be read again.
"""

Fall = Literal["linear", "cosine", "constant"]
"""How a learning rate falls, once it has risen: see `trainer.rates`."""

Way = Literal["delete", "swap", "shift", "reverse", "replace", "punctuate", "translate"]
"""How a text is varied."""


class CleanConfig(BaseModel):
    """Which rated rows are not learnt from. States still see every event, as the scorer's do."""

    longest_future_seconds: Seconds = Field(
        default=86_400,
        ge=0,
        description="a row dated later than this from now is impossible",
    )
    burst_rows: int = Field(
        default=20,
        ge=2,
        description="more rated rows of one user and text than this in one burst are spam",
    )
    burst_seconds: Seconds = Field(default=60, gt=0, description="length of one burst")
    repeated_text_users: int = Field(
        default=5,
        ge=2,
        description="a long text shared by this many users is copied; the first is kept",
    )
    repeated_text_characters: int = Field(
        default=80,
        ge=1,
        description="shorter texts may honestly repeat ('Works great')",
    )


class SplitConfig(BaseModel):
    """Shares of the rated rows, by time: train, then validation, then test."""

    validation_share: float = Field(
        default=0.1, gt=0, le=0.4, description="of rows; picks and calibrates"
    )
    test_share: float = Field(
        default=0.1, gt=0, le=0.4, description="of rows; the newest, for the gate"
    )


class SampleConfig(BaseModel):
    """Which train rows are learnt from; raise `rows` until it stops paying."""

    rows: int = Field(default=0, ge=0, description=f"at most, {LEAST_ROWS} or more; 0: all")
    by: Literal["newest", "rarity", "user"] = Field(
        default="newest",
        description="newest: forget what is older; rarity: prefer seldom stars; user: as many of "
        "each user as can be, newest first",
    )

    @field_validator("rows")
    @classmethod
    def _teach(cls, rows: int) -> int:
        if 0 < rows < LEAST_ROWS:
            raise ValueError(f"fewer than {LEAST_ROWS} rows teach nothing; 0 takes all")
        return rows


class AugmentConfig(BaseModel):
    """Variants of review texts to fine-tune on; `trainer.augment` says what each way does."""

    ways: tuple[Way, ...] = Field(
        default=(), description="ways to vary a text, one drawn for each variant; none: no variants"
    )
    share: float = Field(default=0.1, gt=0, lt=1, description="of a text's words that are changed")
    variants: int = Field(default=1, ge=1, le=16, description="of each text, new in every epoch")
    there: str | None = Field(
        default=None, description="a translation model's directory, for translate"
    )
    back: str | None = Field(default=None, description="a directory for the way back")

    @model_validator(mode="after")
    def _has_translators(self) -> Self:
        if "translate" in self.ways and not (self.there and self.back):
            raise ValueError("translate needs the directories `there` and `back`")
        return self


class FineTuneConfig(BaseModel):
    """How the encoder is fitted with the star head (all methods but frozen)."""

    epochs: int = Field(default=2, ge=1, le=100, description="passes over the texts")
    patience: int = Field(
        default=0,
        ge=0,
        description="epochs without a better validation loss before it ends; 0: validation texts "
        "are learnt from too, to the last epoch",
    )
    batch_texts: int = Field(default=16, ge=1, le=4_096, description="texts in a step")
    token_budget: int = Field(
        default=4_096,
        ge=64,
        description="most padded tokens at once; a step is taken in parts of like length",
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="highest, of whole weights")
    adapter_learning_rate: float = Field(
        default=2e-3, gt=0, le=1, description="highest, of weights that a method adds"
    )
    head_learning_rate: float = Field(default=1e-3, gt=0, le=1, description="highest, of the head")
    layer_decay: float = Field(
        default=0.9, gt=0, le=1, description="of the rate, with each layer below the last"
    )
    warm_up: float = Field(default=0.1, ge=0, lt=1, description="share of steps; the rate rises")
    schedule: Fall = Field(default="linear", description="of the rate after the warm-up")
    weight_decay: float = Field(default=0.01, ge=0, le=10, description="AdamW's decoupled decay")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    averaged: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="share of the steps, the last ones, whose weights are averaged; not with "
        "patience, nor by adalora",
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="of all layers; none: as the encoder has it; "
        "attention's weights are not dropped where an encoder leaves attention to transformers",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share given to all stars")
    cross_entropy: float = Field(default=1.0, ge=0, description="weight of the loss of five stars")
    squared_error: float = Field(
        default=0.5, ge=0, description="weight of the expected rating's squared error"
    )
    ordinal: float = Field(default=0.0, ge=0, description="weight of CORAL's loss of ranks")
    top_layers: int = Field(default=2, ge=1, le=48, description="layers fitted by top_layers")
    rank: int = Field(default=8, ge=1, le=256, description="of lora's and adalora's factors")
    bottleneck: int = Field(default=32, ge=1, le=1_024, description="width of adapters")
    virtual_tokens: int = Field(default=16, ge=1, le=512, description="of prefix and prompt")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of products; fp16 needs a GPU"
    )
    checkpointing: bool = Field(
        default=False, description="compute activations twice, to hold fewer"
    )
    compile: bool = Field(default=False, description="by torch.compile; needs a C++ compiler")
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not self.cross_entropy + self.squared_error + self.ordinal:
            raise ValueError("cross_entropy, squared_error or ordinal must be above 0")
        return self


class AdaptConfig(BaseModel):
    """Masked-language modelling on the shop's own texts, before anything else is fitted.

    Where `trainer.text.method` is auto, an encoder in service is not adapted again.
    """

    epochs: int = Field(default=0, ge=0, le=100, description="passes over the texts; 0: none")
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="highest")
    batch_texts: int = Field(default=32, ge=1, le=4_096, description="texts in a step")


class TextConfig(BaseModel):
    """The star head on review texts: how many stars does a text mean."""

    method: Method = Field(
        default="auto",
        description="which weights of the encoder are fitted with the head; auto: full at first, "
        "frozen once a model with an encoder serves",
    )
    text_limit: int = Field(
        default=100_000,
        ge=0,
        description="newest review texts that an encoder is fitted to; 0: all (0.1 to 0.3 s each "
        "on a core)",
    )
    head_limit: int = Field(
        default=20_000,
        ge=0,
        description="newest review texts that a head alone is fitted to; 0: all (20 to 40 ms each "
        "on a core)",
    )
    least_texts: int = Field(
        default=100, ge=20, description="with fewer rated texts no head is fitted"
    )
    l2: float | None = Field(
        default=None, ge=0, le=10, description="of the head's squared weights; none: validated"
    )
    pseudo_labels: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="texts without stars are learnt from where the first head gives their "
        "likeliest stars at least this probability; 0: none are",
    )
    adapt: AdaptConfig = Field(default_factory=AdaptConfig)
    fine_tune: FineTuneConfig = Field(default_factory=FineTuneConfig)

    @property
    def limit(self) -> int:
        """Newest texts that the method takes at most: a head alone has few weights to learn."""
        return (self.head_limit if self.method == "frozen" else self.text_limit) or sys.maxsize


class SizesConfig(BaseModel):
    """Sizes of the fused network, and what it forgets in training."""

    members: int = Field(default=1, ge=1, le=32, description="networks that are averaged")
    width: int = Field(default=64, ge=1, le=4_096, description="of the two hidden layers")
    token: int = Field(default=32, ge=1, le=1_024, description="width of a recent item")
    heads: int = Field(  # of no use beside a taste: docs/decisions/0034
        default=0, ge=0, le=64, description="of the attention over recent items; 0: there is none"
    )
    identity: int = Field(
        default=0, ge=0, le=256, description="width of a hashed id's embedding; 0: none"
    )
    factors: int = Field(
        default=8, ge=0, le=64, description="of the taste that recent ratings tell; 0: none"
    )
    dropout: float = Field(default=0.3, ge=0, lt=1, description="of hidden units")
    unknown: float = Field(default=0.2, ge=0, le=1, description="share of ids made unknown")


class FitConfig(BaseModel):
    """The fused network's fit."""

    epochs: int = Field(default=20, ge=1, le=1_000, description="most passes over the rows")
    patience: int = Field(default=6, ge=1, description="epochs without a better validation RMSE")
    batch_rows: int = Field(default=512, ge=8, le=65_536, description="rows in a step")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="highest rate of AdamW")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="AdamW's decoupled decay")
    identity_decay: float = Field(
        default=3.0, ge=0, le=100, description="of squared embeddings of ids, each time they occur"
    )
    squared_error: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="weight of the mean's squared error beside cross entropy",
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    sizes: SizesConfig = Field(default_factory=SizesConfig)
    trees: bool = Field(
        default=True, description="boosted trees beside the network, where they are of use"
    )
    refit: bool = Field(
        default=True,
        description="after the evaluation, fit once more on all rows for the bundle",
    )


class GateConfig(BaseModel):
    """What a new model must show on the newest rows before it serves."""

    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="of paired bootstrap intervals"
    )
    resamples: int = Field(default=2_000, ge=100, le=100_000, description="bootstrap resamples")
    least_rows: int = Field(default=30, ge=10, description="fewest newest rows that can decide")
    least_unseen: int = Field(
        default=200,
        ge=10,
        description="of the newest rows those that came after all that stable was fitted to, on "
        "which alone it is compared; with fewer on all, some of which it knows",
    )
    worse_allowed: float = Field(
        default=0.005,
        ge=0,
        le=0.5,
        description="share by which RMSE may exceed stable's, within the noise",
    )
    largest_ece: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="largest expected calibration error of the distribution; more where so few "
        "rows show more by chance",
    )
    least_coverage: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="least share of ratings within their 80% interval; less, likewise",
    )


class DriftConfig(BaseModel):
    """When `retrain --on-drift` fits a model before its time."""

    least_rows: int = Field(
        default=500, ge=50, description="fewer reviews with stars since the last fit tell nothing"
    )
    largest_index: float = Field(
        default=0.25, gt=0, description="population stability index of a column that has changed"
    )
    largest_share: float = Field(
        default=0.2, gt=0, le=1, description="of features that may have changed"
    )
    largest_error: float = Field(
        default=1.05, ge=1, description="RMSE now by the RMSE when it was fitted"
    )


class TrackingConfig(BaseModel):
    """Where the figures of a fit go while it goes on."""

    folder: str = Field(default=".starcast/runs", description="TensorBoard files; a folder a run")
    wandb_project: str | None = Field(
        default=None, description="of Weights & Biases, which must be installed; none: not sent"
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="offline", description="offline: into the folder, for `wandb sync`"
    )
    mlflow_uri: str | None = Field(
        default=None, description="of MLflow, which must be installed; none: not sent"
    )


class TrainerConfig(BaseModel):
    """How a model is fitted, evaluated and admitted."""

    seed: int = Field(  # of which some libraries take 32 bits, and trials add to it
        default=7, ge=0, lt=2**31, description="of everything drawn at random"
    )
    threads: int = Field(
        default=0, ge=0, le=1_024, description="torch threads; 0: as torch decides"
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    checkpoints: str = Field(
        default=".starcast/checkpoints",
        description="folder where `train` and `retrain` take up the fit of an encoder that was "
        "killed, once a minute a file; of several hosts it has to be the same storage",
    )
    least_rated: int = Field(
        default=200, ge=LEAST_ROWS, description="with fewer rated rows nothing is fitted"
    )
    clean: CleanConfig = Field(default_factory=CleanConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    fit: FitConfig = Field(default_factory=FitConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    drift: DriftConfig = Field(default_factory=DriftConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
