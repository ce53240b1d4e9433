"""The tasks by name.

Every module of `eval.tasks` has a tuple `TASKS`.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from qwenvl_jax.errors import ConfigError, did_you_mean
from qwenvl_jax.eval import tasks
from qwenvl_jax.eval.task import Task


@functools.cache
def all_tasks() -> Mapping[str, Task]:
  """Returns every task by its name, in the order of modules and their tuples.

  Raises:
    ValueError: two tasks of one name.
  """
  found = {}
  for module in sorted(
    module.name for module in pkgutil.iter_modules(tasks.__path__)
  ):
    for task in importlib.import_module(f'{tasks.__name__}.{module}').TASKS:
      if task.name in found:
        raise ValueError(f'two tasks are called {task.name}')
      found[task.name] = task
  return MappingProxyType(found)


def get(name: str) -> Task:
  """Returns a task; ConfigError if there is none of this name."""
  found = all_tasks().get(name)
  if found is None:
    near = did_you_mean(name, all_tasks())
    raise ConfigError(f'no task {name!r}{near}; qwenvl-eval --list shows all')
  return found
