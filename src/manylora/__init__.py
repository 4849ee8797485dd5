"""ManyLoRA: fine-tune one language model for many tasks and many clients.

Importing this package registers the method with PEFT: at once where PEFT is imported already, else at the
moment it is. So `import manylora` costs nothing where no model is needed, as in `manylora --help`.
"""

from typing import TYPE_CHECKING, Any

from manylora import _registration
from manylora._version import __version__

if TYPE_CHECKING:
    from manylora.adapters import ManyLoraConfig

__all__ = ["ManyLoraConfig", "__version__"]

_registration.register_with_peft()


def __getattr__(name: str) -> Any:
    if name == "ManyLoraConfig":
        from manylora.adapters import ManyLoraConfig

        return ManyLoraConfig
    raise AttributeError(f"module 'manylora' has no attribute {name!r}")
