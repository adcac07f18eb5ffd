"""Ways to fit an encoder: which of its weights, what is added to them, and how that is written.

In full, or the top layers alone; or by a few weights that are added, by `peft` (LoRA, AdaLoRA,
IA3, prefixes, prompts) or as adapters (`model.adapters`), while the encoder's own stay.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from model import adapters
from model import encoder as encoders
from model.encoder import TextEncoder
from trainer import layers
from trainer.config import FineTuneConfig, Method
from trainer.exceptions import TrainerError

IN_FULL: tuple[Method, ...] = ("full", "top_layers")  # nothing is added

_UNUSED = r".*pooler.*"  # a pooler, which many encoders have, is never used
_MERGED: tuple[Method, ...] = ("lora", "adalora", "ia3")  # what they add goes into the weights


def trainable(
    encoder: TextEncoder, method: Method, config: FineTuneConfig, steps: int
) -> nn.Module:
    """The encoder's model, where only the weights that the method fits require gradients.

    It is the encoder's own, changed. `steps`: of the whole fit, by which AdaLoRA lowers its ranks.

    Raises:
        EncoderError: it has no layers that the method could name.
        TrainerError: it does not take the method.
    """
    model = encoder.model
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    if config.checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(method == "full")
    if method == "top_layers":
        for layer in adapters.layers(model)[-config.top_layers :]:
            layer.requires_grad_(True)
    elif method == "adapters":
        adapters.add(model, config.bottleneck)
        for layer in adapters.layers(model):
            cast(adapters.Adapted, layer).down.requires_grad_(True)
            cast(adapters.Adapted, layer).up.requires_grad_(True)
    elif method != "full":
        model = _with_peft(model, method, config, steps).to(encoder.device)
        _try(encoder.holding(model), method)
    layers.lighten(model, encoder.device)
    return model.to(encoder.device)


def _with_peft(model: nn.Module, method: Method, config: FineTuneConfig, steps: int) -> nn.Module:
    import peft  # slow to import, and of use here alone

    task: Any = peft.TaskType.FEATURE_EXTRACTION
    linear: Any = {"target_modules": "all-linear", "exclude_modules": _UNUSED}
    scale = 2 * config.rank
    settings: Any
    if method == "lora":
        settings = peft.LoraConfig(
            task, r=config.rank, lora_alpha=scale, lora_dropout=0.05, **linear
        )
    elif method == "adalora":
        # Ranks are taken away between a tenth and seven tenths of the steps, to half of what they
        # were at first (Zhang et al. 2023, "AdaLoRA", section 3.3 and table 7's schedule).
        settings = peft.AdaLoraConfig(
            task,
            init_r=2 * config.rank,
            target_r=config.rank,
            lora_alpha=scale,
            lora_dropout=0.05,
            **linear,
            total_step=max(steps, 3),
            tinit=max(steps // 10, 1),
            tfinal=max(3 * steps // 10, 1),
        )
    elif method == "ia3":
        settings = peft.IA3Config(task)
    elif method == "prefix":
        settings = peft.PrefixTuningConfig(task, num_virtual_tokens=config.virtual_tokens)
    else:
        settings = peft.PromptTuningConfig(task, num_virtual_tokens=config.virtual_tokens)
    try:
        return cast(nn.Module, peft.get_peft_model(cast(Any, model), settings))
    except (ValueError, AttributeError, KeyError) as error:
        raise TrainerError(
            f"{type(model).__name__} does not take {method}: {error}; choose another text.method"
        ) from error


def _try(encoder: TextEncoder, method: Method) -> None:
    """Read a text: some models cannot with virtual tokens, and some read on without them."""
    found: RuntimeError | str = "it does not hear what is added"
    try:
        if encoder.embed(encoder.tokens(["text"])).requires_grad:
            return
    except RuntimeError as error:
        found = error
    name = type(cast(Any, encoder.model).get_base_model()).__name__
    raise TrainerError(f"{name} does not take {method}: {found}; choose another text.method")


def write(encoder: TextEncoder, method: Method, folder: Path) -> None:
    """Write a fitted encoder's folder; what was added is merged, or stands beside the weights."""
    model: Any = encoder.model
    if method in _MERGED:
        replace(encoder, model=model.merge_and_unload()).save(folder)
    elif method == "adapters":
        weights = adapters.remove(model)
        encoder.save(folder)
        adapters.write(folder, weights)
    elif method in IN_FULL:
        encoder.save(folder)
    else:
        replace(encoder, model=model.get_base_model()).save(folder)
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = ""  # it is the folder above, wherever that lies
        model.save_pretrained(folder / encoders.PROMPT)
