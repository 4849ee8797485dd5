"""Options that transformers' Trainer has by name: where it reports to, and its optimizer.

Each is tried before anything is trained, so that what is not installed is refused in one line.
"""

from __future__ import annotations

import re
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames

from manylora.errors import ConfigError
from manylora.training.config import TrainConfig, as_list
from manylora.training.models import first_line, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

_INSTALL = re.compile(r"pip install ([\w.\[\]>=+:/-]*[\w\]])")
_PACKAGE_OF_A_REPORTER = {
    "azure_ml": "azureml-sdk",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "'manylora[tensorboard]'",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""transformers names them only in errors of its callbacks, of which some cannot even be thrown away without a noise."""
_FOR_WHOLE_MODELS = ("galore", "apollo", "lomo", "adalomo")
"""Optimizers that spare memory where whole matrices are trained; some step inside the backward pass, where no check of
the gradient could come before."""


def reporters(config: TrainConfig) -> list[str]:
    """What the trainer reports to, beside metrics.jsonl."""
    return [name for name in as_list(config.report_to) or [] if name != "none"]


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a name that transformers does not know, and one whose package is missing.

    Raises:
        ConfigError: naming it and the remedy.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"report_to {name!r} is unknown to transformers; choose from {known}, or none.")
        if name in _PACKAGE_OF_A_REPORTER and name not in _available_reporters():
            raise ConfigError(
                f"report_to {name} is not set up here: pip install {_PACKAGE_OF_A_REPORTER[name]}."
            )


def _available_reporters() -> set[str]:
    flyte = {"flyte"} if find_spec("flytekit") else set()  # which transformers leaves out of its list
    return {*get_available_reporting_integrations(), *flyte}


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that transformers does not know, and one that cannot take a step here.

    Raises:
        ConfigError: naming it and the remedy.
    """
    name = config.optimizer
    if name == "adamw_torch":
        return
    known = [choice.value for choice in OptimizerNames if not choice.value.startswith(_FOR_WHOLE_MODELS)]
    if name not in known:
        raise ConfigError(
            f"optimizer {name!r} is for training whole models; leave it out, or take adamw_8bit."
            if name.startswith(_FOR_WHOLE_MODELS)
            else f"optimizer {name!r} is unknown to transformers; choose from {', '.join(known)}."
        )
    device = pick_device(config.device)
    arguments = TrainingArguments(
        output_dir="unused", optim=name, use_cpu=device.type == "cpu", report_to="none"
    )
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.ones(64, 64, device=device))  # bitsandbytes: 8 bit from 4,096 on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which the training gives again
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
            optimizer = kind(layer.parameters(), **options)
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
    except Exception as error:  # of any library
        found = _INSTALL.search(str(error))
        remedy = (
            f"needs another package: pip install {found[1]}"
            if found
            else f"cannot run here ({first_line(error)}); choose another, such as adamw_torch"
        )
        raise ConfigError(f"optimizer {name} {remedy}.") from error
