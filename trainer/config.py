"""Settings of the trainer; `starcast config` prints them."""

from typing import Literal

from pydantic import BaseModel, Field


class CleanConfig(BaseModel):
    """Which rated rows are not learnt from. States still see every event, as the scorer's do."""

    longest_future_seconds: float = Field(
        default=86_400,
        ge=0,
        description="a row dated later than this from now is impossible",
    )
    burst_rows: int = Field(
        default=20,
        ge=2,
        description="more rated rows of one user than this in one burst are spam",
    )
    burst_seconds: float = Field(default=60, gt=0, description="length of one burst")
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


class TextConfig(BaseModel):
    """The star head on review texts: how many stars does a text mean."""

    method: Literal["none", "frozen", "top_layers", "full", "lora"] = Field(
        default="frozen",
        description="which weights of the encoder are fitted with the head",
    )
    top_layers: int = Field(default=2, ge=1, le=48, description="layers fitted by top_layers")
    text_limit: int = Field(
        default=6_000,
        ge=0,
        description="newest review texts that are used; 0: all (20 to 40 ms each on a core)",
    )
    least_texts: int = Field(
        default=100, ge=20, description="with fewer rated texts no head is fitted"
    )
    l2: float | None = Field(
        default=None, ge=0, le=10, description="of the head's squared weights; none: validated"
    )
    epochs: int = Field(default=2, ge=1, le=100, description="passes over the texts (not frozen)")
    learning_rate: float = Field(
        default=5e-5, gt=0, le=1, description="of the encoder (not frozen)"
    )
    head_learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="of the head (not frozen)"
    )
    batch_texts: int = Field(default=32, ge=1, le=4_096, description="texts in a step (not frozen)")
    longest_tokens: int = Field(default=256, ge=8, le=8_192, description="a text is cut here")
    lora_rank: int = Field(default=8, ge=1, le=256, description="rank of LoRA's two factors")


class SizesConfig(BaseModel):
    """Sizes of the fused network, and what it forgets in training."""

    members: int = Field(default=3, ge=1, le=32, description="networks that are averaged")
    width: int = Field(default=64, ge=1, le=4_096, description="of the two hidden layers")
    token: int = Field(default=32, ge=1, le=1_024, description="width of a recent item")
    heads: int = Field(default=2, ge=1, le=64, description="of the attention over recent items")
    identity: int = Field(default=8, ge=1, le=256, description="width of a hashed id's embedding")
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
        description="largest expected calibration error of the distribution",
    )
    least_coverage: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="least share of ratings within their 80% interval",
    )


class TrainerConfig(BaseModel):
    """How a model is fitted, evaluated and admitted."""

    seed: int = Field(default=7, ge=0, description="of everything drawn at random")
    threads: int = Field(
        default=0, ge=0, le=1_024, description="torch threads; 0: as torch decides"
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    least_rated: int = Field(
        default=200, ge=50, description="with fewer rated rows nothing is fitted"
    )
    newest_rows: int = Field(
        default=0,
        ge=0,
        description="rated rows that are learnt from, newest first; 0: all",
    )
    clean: CleanConfig = Field(default_factory=CleanConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    fit: FitConfig = Field(default_factory=FitConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
