"""Checkpoints of a run: saved asynchronously, resumed exactly.

`checkpoints/STEP/` holds the items `params` (the whole tree, so that inference
restores it alone; of a run with low-rank factors `trained`, without what is
frozen, which is the base's), `optimizer` (moments, counters and checksums of
all arrays, computed where they live), `data` (the state of the input iterator)
and, of a run with a guard, `guard`. How they get there is `SavedSteps`'.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from qwenvl_jax import buckets
from qwenvl_jax.conversion.checkpoint_io import CHECKPOINTS
from qwenvl_jax.conversion.event_loops import ended_tasks
from qwenvl_jax.conversion.low_rank import TRAINED
from qwenvl_jax.errors import CheckpointError, check_at_least_1
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.data_shard import DataShard
from qwenvl_jax.train.data_state import DataState, DataStateHandler
from qwenvl_jax.train.failures import first_line
from qwenvl_jax.train.guard import LossSpikeDetector
from qwenvl_jax.train.optimizer import flatten, unflatten
from qwenvl_jax.train.saved_steps import SavedSteps
from qwenvl_jax.train.state import TrainState, run_once_options

# Of one chunk of a large parameter.
_CHUNK_BYTES = 32 * 2**20

_COUNTERS = ('step', 'skipped', 'skipped_in_a_row')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep.

  Attributes:
    every: steps between checkpoints; the last step is always saved.
    keep: number of newest checkpoints kept; at least 2 leave one to go back to
      should the newest be damaged.
  """

  every: int = 1000
  keep: int = 3

  def __post_init__(self):
    check_at_least_1(self, 'every', 'keep')


class Checkpoints(SavedSteps):
  """The checkpoints of one run's folder.

  Attributes:
    item: what a step calls its parameters.
    newest: the newest step saved or being saved.
  """

  def __init__(
    self,
    workdir: Path,
    config: CheckpointConfig,
    coordinator: Coordinator | None = None,
    shard: DataShard | None = None,
    on_base: bool = False,
  ):
    """Opens the folder and clears away what a kill left half written.

    Of a run `on_base`, what is frozen is a base's, and not saved.
    """
    self._on_base = on_base
    self.item = TRAINED if on_base else 'params'
    self._shard = shard or DataShard()
    super().__init__(
      buckets.absolute(workdir) / CHECKPOINTS,
      {
        self.item: ocp.StandardCheckpointHandler(),
        'optimizer': ocp.StandardCheckpointHandler(),
        'data': DataStateHandler(),
        'guard': ocp.JsonCheckpointHandler(),
      },
      coordinator or Coordinator(),
      max_to_keep=config.keep,
    )
    self.newest = self.manager.latest_step()

  def save(
    self,
    step: int,
    state: TrainState,
    iterator: Any,
    detector: LossSpikeDetector | None = None,
  ) -> None:
    """Starts saving; returns when the state may change again.

    Beside the state of the parameters, those of the data and of the guard.

    Raises:
      CheckpointError: this save or the one before it failed, e.g. for lack of
        space. Steps saved earlier stay valid.
    """
    if step == self.newest:
      return
    state = self.held(state)
    optimizer = _optimizer_item(state) | {'checksums': checksums(state)}
    items = {
      self.item: ocp.args.StandardSave(
        state.params, save_args=save_args(state.params)
      ),
      'optimizer': ocp.args.StandardSave(optimizer),
      'data': DataState(iterator, self._shard),
    }
    if detector is not None:
      items['guard'] = ocp.args.JsonSave(detector.get_state())
    self.save_items(step, items)
    self.newest = step

  def restore(
    self,
    target: TrainState,
    iterator: Any,
    warn: Callable[[str], None] = print,
    detector: LossSpikeDetector | None = None,
    until: int | None = None,
  ) -> TrainState | None:
    """Restores the newest step that can be restored, the same everywhere.

    A damaged step is named through `warn`, moved to `checkpoints-damaged/`, and
    the one before it is used.

    Args:
      target: `ShapeDtypeStruct`s with shardings; on a base, with the values of
        what is frozen, which the state gets.
      iterator: set to the state that was saved with the step; None for none.
      warn: told what was skipped.
      detector: as `iterator`; stays as it is if the step was saved without.
      until: the newest step to consider.

    Returns:
      The state, or None if nothing has been saved yet.

    Raises:
      CheckpointError: no step can be restored, or the run was started with
        another configuration.
    """
    frozen, target = target.frozen, self.held(target)
    damaged = {}
    for step in sorted(self.all(), reverse=True):
      if until is not None and step > until:
        continue
      state, reason = self._attempt(step, target, iterator, detector)
      if reason is not None:
        self.note_failure()
        damaged[step] = reason
        continue
      then = f'going on from step {step}'
      self.set_aside(damaged, warn, then)
      self.newest = step
      if self._on_base:
        state = dataclasses.replace(state, frozen=frozen)
      return state
    if damaged:
      reasons = '; '.join(f'step {s}: {r}' for s, r in damaged.items())
      raise CheckpointError(
        f'no checkpoint in {self.folder} can be restored ({reasons}). Bring '
        'back a copy of one, or start anew in another --workdir'
      )
    return None

  def go_back(
    self,
    good: int,
    target: TrainState,
    warn: Callable[[str], None],
    detector: LossSpikeDetector | None,
  ) -> TrainState | None:
    """Restores the newest step up to a good one, but for the data.

    Later steps are deleted: they will be made again, otherwise. Arguments and
    result are those of `restore`.
    """
    self.finish()
    state = self.restore(target, None, warn, detector, until=good)
    if state is not None:
      for step in self.all():
        if step > self.newest:
          self.delete(step)
    return state

  def held(self, state: TrainState) -> TrainState:
    """What a step holds of a state."""
    return dataclasses.replace(state, frozen={}) if self._on_base else state

  def _attempt(self, step, target, iterator, detector):
    """(state, None), or (None, what is wrong with the step)."""
    reason = self.damage(step)
    if reason is not None:
      return None, reason
    state = None
    try:
      with ended_tasks():
        self._check_same_run(step, target)
        state, saved = self._read(step, target, iterator, detector)
    except CheckpointError:
      raise
    except Exception as error:  # Orbax raises whatever it stumbled over.
      self.check_reachable(error, f'reading {self.folder / str(step)}')
      reason = first_line(error)
    # One process may have met damage that the others do not read.
    reasons = self.gather(f'reading step {step}', reason)
    found = [x for x in reasons if x is not None]
    if found:
      return None, found[0]
    saved, now = jax.device_get((saved, checksums(state)))
    if (saved != now).any():
      changed = [k for k, s, n in zip(_names(state), saved, now) if s != n]
      return None, f'contents changed on disk: {", ".join(changed[:3])}'
    return state, None

  def _read(self, step, target, iterator, detector):
    """(state, checksums that were saved with it).

    Not through the manager, whose processes wait for each other even when one
    of them has failed.
    """
    folder = epath.Path(self.folder) / str(step)
    optimizer = _optimizer_item(target)
    optimizer['checksums'] = _abstract_checksums(target)
    read = ocp.StandardCheckpointHandler().restore
    params = read(
      folder / self.item, args=ocp.args.StandardRestore(target.params)
    )
    optimizer = read(
      folder / 'optimizer', args=ocp.args.StandardRestore(optimizer)
    )
    if iterator is not None:
      args = DataState(iterator, self._shard)
      DataStateHandler().restore(folder / 'data', args=args)
    if detector is not None and (folder / 'guard').exists():
      detector.set_state(
        ocp.JsonCheckpointHandler().restore(
          folder / 'guard', args=ocp.args.JsonRestore()
        )
      )
    params = flatten(params)
    state = TrainState(
      trained=_like(target.trained, params),
      frozen=_like(target.frozen, params),
      opt_state=_unnested(optimizer['opt_state'], target.opt_state),
      **{name: optimizer[name] for name in _COUNTERS},
    )
    return state, optimizer['checksums']

  def _check_same_run(self, step: int, target: TrainState) -> None:
    """Tells a changed configuration from a damaged checkpoint."""
    metadata = self.manager.item_metadata(step)
    optimizer = _optimizer_item(target)
    optimizer['checksums'] = _abstract_checksums(target)
    for item, tree in ((self.item, target.params), ('optimizer', optimizer)):
      stored, wanted = _shapes(metadata[item].tree), _shapes(tree)
      if stored == wanted:
        continue
      differing = sorted(
        k
        for k in stored.keys() | wanted.keys()
        if stored.get(k) != wanted.get(k)
      )
      shown = [
        f'{k}: saved {stored.get(k, "not")}, wanted {wanted.get(k, "not")}'
        for k in differing[:4]
      ]
      raise CheckpointError(
        f'{self.folder}/{step} was saved by a run with another model or '
        f'another choice of trained parameters; {len(differing)} of its {item} '
        f'differ: {"; ".join(shown)}. Go on with the config.gin beside it, or '
        'choose another --workdir (and InitFrom.params to start from this one)'
      )


def save_args(params: Any, limit: int = _CHUNK_BYTES) -> Any:
  """How parameters are cut into chunks: one layer or less where they are large.

  Orbax alone would write what a device holds as one chunk, which can only be
  read as a whole; conversion reads a layer at a time.

  Args:
    params: nested dict of arrays; those under `blocks` are stacked by layer.
    limit: bytes of a chunk.

  Returns:
    Tree of `SaveArgs`.
  """

  def args(path, leaf):
    shape = leaf.sharding.shard_shape(leaf.shape)
    if math.prod(shape) * leaf.dtype.itemsize <= limit:
      return ocp.SaveArgs()
    stacked = 'blocks' in _name(path).split('/')
    return ocp.SaveArgs(
      chunk_byte_size=limit, shard_axes=(0,) if stacked else ()
    )

  return jax.tree_util.tree_map_with_path(args, params)


def checksums(state: TrainState) -> jax.Array:
  """A uint32 for each leaf of the state, computed where the leaf lives."""
  return _compiled_checksums()(jax.tree.leaves(state))


@functools.cache
def _compiled_checksums():
  def checksum(x):
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # Odd factors that differ by place. The sum wraps around; its order, and so
    # the mesh, does not matter.
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jax.jit(
    lambda leaves: jnp.stack([checksum(x) for x in leaves]),
    compiler_options=run_once_options(),
  )


def _abstract_checksums(target: TrainState) -> jax.ShapeDtypeStruct:
  shape = (len(jax.tree.leaves(target)),)
  sharding = target.step.sharding
  return jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=sharding)


def _optimizer_item(state: TrainState) -> dict:
  counters = {name: getattr(state, name) for name in _COUNTERS}
  return counters | {'opt_state': _nested(state.opt_state)}


def _nested(tree: Any) -> dict:
  """Any pytree as a nested dict, named as its leaves' paths are."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return unflatten({_name(path): leaf for path, leaf in leaves})


def _unnested(nested: dict, like: Any) -> Any:
  """Undoes `_nested`."""
  values = flatten(nested)
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  return structure.unflatten([values[_name(path)] for path, _ in leaves])


def _names(tree: Any) -> list[str]:
  return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _like(target: Any, values: dict) -> Any:
  return unflatten({path: values[path] for path in flatten(target)})


def _shapes(tree: Any) -> dict[str, tuple]:
  return {k: (tuple(v.shape), str(v.dtype)) for k, v in flatten(tree).items()}
