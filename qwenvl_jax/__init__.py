"""Qwen-VL (arXiv 2308.12966) in JAX and Flax."""

import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from qwenvl_jax.api import QwenVLModel, digest, load

__all__ = ['QwenVLModel', 'digest', 'load']

# What programs of earlier versions may name.
_EARLIER_NAMES = {'Handle': 'QwenVLModel'}


def __getattr__(name):
  # Lazy, so that `import qwenvl_jax.text` does not pay for JAX.
  if name in __all__ or name in _EARLIER_NAMES:
    from qwenvl_jax import api

    return getattr(api, _EARLIER_NAMES.get(name, name))
  # Neither does it ask for an installation.
  if name == '__version__':
    return importlib.metadata.version('qwenvl_jax')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__, '__version__'})
