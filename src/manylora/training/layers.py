"""An adapter's file beside the architecture that it was made for, for those who read the file and load no base.

What of a file is missing as a whole (half of the layers, say) only the base's architecture can tell.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig

from manylora.adapters import put_weights
from manylora.errors import ManyLoraError, ModelError
from manylora.training.heads import head_of
from manylora.training.models import first_line, load_config, with_adapter

if TYPE_CHECKING:
    from torch import Tensor


def check_layers(
    config: PeftConfig, weights: Mapping[str, Tensor], *, base: str | None, source: object
) -> bool:
    """Refuse weights that are not those which such an adapter has on its base; no weight of the base is read.

    Where this machine does not have the base's configuration (its config.json, or the Hub's copy in the cache), or the
    base is neither a causal language model nor a classifier, nothing is checked.

    Args:
        config: the adapter's settings.
        weights: its weights, as PEFT saves them.
        base: its base model.
        source: for the error.

    Returns:
        Whether anything was checked.

    Raises:
        ModelError: a weight is missing, left over or of another shape.
        TargetModulesError: the base has no such layers.
    """
    head = head_of(config.task_type)
    try:
        architecture = load_config(base or "", task_type=config.task_type, offline=True)
    except ManyLoraError:
        return False
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = (
            True  # others compute the first weights from the base's, which are not there
        )
    config, weights = head.bare(config, weights)
    try:
        with torch.device("meta"):
            shadow = with_adapter(head.loader.from_config(architecture), config, low_cpu_mem_usage=True)
    except ManyLoraError:
        raise
    except ValueError as error:  # PEFT: no such layers
        raise ModelError(f"{source} does not fit {base} ({first_line(error)}).") from error
    put_weights(shadow, weights, source=source, target=str(base), low_cpu_mem_usage=True)
    return True
