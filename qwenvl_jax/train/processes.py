"""How a process joins the others of a run, and how it leaves them."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator, Mapping

import jax
from jax._src import clusters

from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.train.coordinator import Coordinator, LostProcessError

COORDINATOR = 'QWENVL_COORDINATOR'
COUNT = 'QWENVL_NUM_PROCESSES'
INDEX = 'QWENVL_PROCESS_ID'

# Seconds to wait for all processes to arrive.
ARRIVAL = 300.0

# Seconds that JAX waits for what `Coordinator` has found to be there.
_JAX_TIMEOUT = 60


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of a run this is.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: of processes.
    index: of this one.
  """

  coordinator: str
  count: int
  index: int


def find_place(
  environ: Mapping[str, str], detect: bool = False
) -> Place | None:
  """Which process this is; None if it is alone.

  Args:
    detect: look for a pod (or Slurm or MPI job) around this process if the
      environment says nothing.

  Raises:
    ConfigError: an incomplete or impossible place, or no pod.
  """
  names = (COORDINATOR, COUNT, INDEX)
  missing = [name for name in names if not environ.get(name)]
  if len(missing) < len(names):
    if missing:
      raise ConfigError(
        f'{" and ".join(missing)} not set: a process of several needs '
        f'{COORDINATOR}=HOST:PORT of process 0, {COUNT} and {INDEX} (from 0)'
      )
    return _checked(*(environ[name] for name in names))
  if not detect:
    return None
  try:
    # JAX's own way to find a pod, which it does not export.
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(ARRIVAL)
    )
  except (RuntimeError, OSError) as error:
    raise ConfigError(f'--distributed: {error}') from error
  if found[0] is None:
    raise ConfigError(
      '--distributed: this is no TPU pod (nor a Slurm or MPI job) that JAX '
      f'knows; say it with {COORDINATOR}=HOST:PORT, {COUNT} and {INDEX}'
    )
  return _checked(*found[:3])


def _checked(coordinator: str, count, index) -> Place:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ConfigError(f'{COORDINATOR}={coordinator} is not HOST:PORT')
  for name, value in ((COUNT, count), (INDEX, index)):
    if not str(value).isdigit():
      raise ConfigError(f'{name}={value} is not a number')
  count, index = int(count), int(index)
  if not index < count:
    raise ConfigError(
      f'{INDEX}={index} with {COUNT}={count}: processes are numbered from 0 to '
      f'{count - 1}'
    )
  return Place(coordinator, count, index)


@contextlib.contextmanager
def joined(
  place: Place | None, timeout: float = ARRIVAL
) -> Iterator[Coordinator]:
  """Joins the other processes of a run for a while.

  Initializes `jax.distributed`; before any other use of JAX. An exception ends
  this process, and tells the others why; the loss of another ends it, too
  (`coordinator.LOST`).

  Without a place, the run is of this process alone.
  """
  if place is None or place.count == 1:
    yield Coordinator()
    return
  coordinator = Coordinator(place.index, place.count)
  try:
    coordinator.wait_for_all(place.coordinator, timeout)
    _initialize_jax(place)
    yield coordinator
    coordinator.gather('the end')
    jax.distributed.shutdown()
    coordinator.leave()
  except BaseException as error:
    _end(coordinator, error)


def _initialize_jax(place: Place) -> None:
  """Joins JAX's own coordinator.

  If process 0 dies within this call, JAX aborts the others (SIGABRT, status
  134) before they can say whom they lost.
  """
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    place.coordinator,
    place.count,
    place.index,
    initialization_timeout=_JAX_TIMEOUT,
    shutdown_timeout_seconds=_JAX_TIMEOUT,
  )


def _end(coordinator: Coordinator, error: BaseException) -> None:
  """Ends this process because of an error, here or elsewhere."""
  status, prefix = getattr(error, 'status', 2), ''
  if not isinstance(error, QwenVLError):
    # A collective may fail before it is known that another process did.
    collective = isinstance(error, jax.errors.JaxRuntimeError)
    lost = coordinator.lost_within(10 if collective else 1)
    if lost is not None:
      error, status = lost, lost.status
  said = f'{type(error).__name__}: {error}'
  if isinstance(error, QwenVLError):
    said = str(error)
  elif isinstance(error, KeyboardInterrupt):
    said, status = 'interrupted', 130
  else:
    traceback.print_exception(error)
    status = 1
  if not isinstance(error, LostProcessError):
    prefix = f'{coordinator.name(coordinator.index)}: '
  print(f'error: {prefix}{said}', file=sys.stderr, flush=True)
  coordinator.fail(said, status)
  sys.stdout.flush()
  # Not sys.exit: JAX would wait for the others to leave with it.
  os._exit(status)
