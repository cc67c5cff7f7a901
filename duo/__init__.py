"""The Diffusion Duality (Duo, Duo++) and its baselines: `duo.load(name_or_path)` gives a model that writes, judges and encodes text."""
__version__ = "0.1.0"
__all__ = ["load"]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hub import load as load


def __getattr__(name):
    if name == "load":  # `import duo` itself loads nothing else
        from .hub import load
        return load
    raise AttributeError(f"module 'duo' has no attribute {name!r}")
