"""The Diffusion Duality (Duo, Duo++) and its baselines: a trained model writes, judges and encodes text.

    import duo
    model = duo.load("outputs/train/austen_duo/checkpoints")  # a directory, "owner/name" on the Hugging Face hub, or a .ckpt
    print(*model.sample(4, steps=64), model.nll(["It is a truth universally acknowledged"]).nats)

Each module is there as `duo.NAME` (`duo.samplers`, `duo.training`, …) and is imported when first asked for.
"""
__version__ = "0.1.0"
__all__ = ["load"]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hub import load as load


def _modules():
    import pkgutil
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"]


def __dir__():
    return sorted({*globals(), *__all__, *_modules()} - {"TYPE_CHECKING"})


def __getattr__(name):
    if name == "load":  # `import duo` itself loads nothing else
        from .hub import load
        return load
    if name[0] != "_" and name in _modules():
        import importlib
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:
            raise AttributeError(f"duo.{name} needs what is not installed: {error}; pip install 'duo-diffusion[run]' brings it") from error
    raise AttributeError(f"module 'duo' has no attribute {name!r}")
