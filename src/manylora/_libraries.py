"""What the libraries below do by themselves: ask a network, and talk to each other over our users' heads."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # nothing is reported home
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextmanager
def calm_libraries() -> Iterator[None]:
    """Keep them quiet while something of ours runs; what the user has set stays, and the warnings are theirs again."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # PEFT imports it; it misses optional kernels aloud
    with warnings.catch_warnings():
        # What they say to each other about their next versions.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")
        yield
