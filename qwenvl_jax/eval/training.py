"""Tasks as a model is trained: small parts of them, on a schedule."""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwenvl_jax import buckets
from qwenvl_jax.data.sources import VOCABULARY
from qwenvl_jax.errors import ConfigError, DataError, check_at_least_1
from qwenvl_jax.eval import registry, runner
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.task import Example, Scores, Task, units
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import CONSTANTS
from qwenvl_jax.text.tokenizer import Tokenizer

_READ_ROWS = 8


@dataclasses.dataclass(frozen=True)
class DuringTraining:
  """Scores of tasks, for `train.loop.TrainConfig.evaluation`.

  The parameters are copied to one device in the dtype of the computation, so
  that one must have room for them; runs of several processes score their
  checkpoints with `qwenvl-eval` instead.

  Attributes:
    tasks: names; the first one's metric decides which state is best, unless
      `TrainConfig.best` names another.
    data_dir: their files.
    every: steps between two evaluations; the run's last step has one, too.
    limit: the first examples of each task.
    slots: answers at a time.
    max_len: tokens of a prompt and its answer; None for the decoder's rows.
  """

  tasks: Sequence[str] = ()
  data_dir: str = 'data'
  every: int = 1000
  limit: int = 200
  slots: int = 32
  max_len: int | None = None

  def __post_init__(self):
    if not self.tasks:
      raise ConfigError('DuringTraining.tasks is empty; name some')
    check_at_least_1(self, 'every', 'limit', 'slots')

  @property
  def measure(self) -> str:
    """Name of the score that decides."""
    return f'{self.tasks[0]}/{registry.get(self.tasks[0]).metric}'

  @functools.cached_property
  def _examples(self) -> list[tuple[Task, list[Example]]]:
    found = [registry.get(name) for name in self.tasks]
    folder = buckets.as_path(self.data_dir)
    return [(task, runner.take(task, folder, self.limit)) for task in found]

  def __call__(
    self, config: QwenVLConfig, params: Any, workdir: Path
  ) -> Scores:
    """Scores the parameters.

    Returns:
      'TASK/METRIC' to the score, as a fraction; and 'TASK/problems', examples
      without an answer, where there are any.

    Raises:
      DataError: no example of a task has an answer, or its files are wrong.
    """
    tokenizer = Tokenizer(workdir / VOCABULARY)
    params = on_one_device(params, config.dtype)
    sizes = EngineConfig(
      slots=self.slots,
      max_len=self.max_len or config.decoder.seq_length,
      read_rows=min(self.slots, _READ_ROWS),
    )
    config = config.replace(param_dtype=config.dtype, remat='none')
    model = EngineModel(Engine(config, params, sizes), tokenizer, {})
    scores = {}
    for task, examples in self._examples:
      with tempfile.TemporaryDirectory() as folder:
        runner.ask(task, examples, lambda: model, Path(folder))
        outcome = runner.score(task, examples, Path(folder))
      if not outcome.items:
        raise DataError(
          f'{task.name}: no example was answered: {outcome.reasons}'
        )
      found = task.aggregate(units(task, outcome.items))
      for name in sorted(found, key=lambda name: name != task.metric):
        scores[f'{task.name}/{name}'] = found[name]
      if outcome.problems:
        scores[f'{task.name}/problems'] = len(outcome.problems)
    return scores


def on_one_device(params: Any, dtype: Any) -> Any:
  """Copies parameters to the first local device, floats in a dtype.

  As in training, the model's constants stay in float32. The words of packed
  kernels are integers, and stay so.
  """
  device = jax.local_devices()[0]

  def copied(path, x):
    x = jax.device_put(x, device)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name in CONSTANTS or not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(copied, params)
