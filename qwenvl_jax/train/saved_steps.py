"""The steps of a folder: saved in the background, each complete or absent.

Orbax writes a step under another name and renames it when it is complete (in a
bucket: marks it), so that a kill leaves no half step behind, and deletes older
ones after that. A manifest of all files tells what changed later. The processes
of a run agree on what is there.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from qwenvl_jax import buckets
from qwenvl_jax.conversion.checkpoint_io import COMPLETE
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.train import manifest
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.failures import NoLateCallbacks, explained, refusal

# One process may read a checkpoint so much longer than another.
_READ_TIMEOUT_S = 1800.0


class SavedSteps:
  """Saves, lists and deletes the steps of one folder.

  Attributes:
    folder: of the steps.
    manager: Orbax's.
    complete: the last step that was saved whole since the folder was opened.
  """

  def __init__(
    self,
    folder: Path,
    handlers: dict[str, ocp.CheckpointHandler],
    coordinator: Coordinator,
    **options: Any,
  ):
    """Opens the folder and clears away what a kill left half written.

    Args:
      folder: made if absent.
      handlers: of the items of a step, by name.
      coordinator: of the processes of the run.
      options: further fields of Orbax's `CheckpointManagerOptions`.

    Raises:
      CheckpointError: the folder cannot be opened.
    """
    self.folder = folder
    self.complete = None
    self._saving = None
    self._coordinator = coordinator
    self._quiet = NoLateCallbacks()
    with self.explained(f'opening {folder}'):
      # Orbax clears away in one thread what it lists in another.
      buckets.hold(folder)
      self.manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
          cleanup_tmp_directories=True,
          enable_async_checkpointing=True,
          **options,
        ),
        item_handlers=handlers,
      )

  def all(self) -> list[int]:
    """The steps that are there; process 0 decides where others see it late."""
    steps = list(self.manager.all_steps())
    return self.agreed('the list of checkpoints', steps)

  def agreed(self, where: str, value: Any) -> Any:
    """What process 0 says, in every process; see `Coordinator.gather`."""
    return self.gather(where, value)[0]

  def gather(self, where: str, value: Any = None) -> list:
    """As `Coordinator.gather`, with the time that reading may take."""
    return self._coordinator.gather(where, value, _READ_TIMEOUT_S)

  def save(self, step: int, items: dict[str, Any], **more: Any) -> None:
    """Starts saving a step; returns when its values may change again.

    Args:
      step: its number, of no step that is there.
      items: name to Orbax's arguments.
      more: of `CheckpointManager.save`.

    Raises:
      CheckpointError: this save or the one before it failed, e.g. for lack of
        space. Steps saved earlier stay valid.
    """
    self.finish()
    with self.explained(f'saving step {step}'):
      self.manager.save(step, args=ocp.args.Composite(**items), **more)
    self._saving = step

  def check(self) -> None:
    """Raises CheckpointError if saving failed in the background."""
    if not self.manager.is_saving_in_progress():
      self.finish()

  def finish(self) -> None:
    """Waits for the last save."""
    if self._saving is None:
      return
    with self.explained(f'saving step {self._saving}'):
      self.manager.wait_until_finished()
      self.manager.check_for_errors()
      if self._coordinator.index == 0:
        manifest.write_checksums(self.folder / str(self._saving))
    self.complete, self._saving = self._saving, None

  def close(self) -> None:
    # A save that failed has been reported, or hides behind a worse error.
    with contextlib.suppress(CheckpointError), self.explained('closing'):
      self.manager.close()
    self._quiet.close()

  def damage(self, step: int) -> str | None:
    """What is wrong with the files of a step, the same in every process.

    Raises:
      CheckpointError: the bucket does not answer.
    """
    reason = None
    if self._coordinator.index == 0:
      try:
        reason = manifest.verify(self.folder / str(step))
      except Exception as error:
        self.check_reachable(error, f'reading {self.folder / str(step)}')
        raise
    return self.agreed(f'the files of step {step}', reason)

  def set_aside(
    self, damaged: dict[int, str], warn: Callable[[str], None], then: str
  ) -> None:
    """Moves damaged steps out of the way, so that they can be saved again.

    Args:
      damaged: step to what is wrong with it.
      warn: told of each.
      then: what the run does instead.
    """
    place = self.folder.parent / f'{self.folder.name}-damaged'
    for step, reason in damaged.items():
      if self._coordinator.index == 0:
        buckets.move(self.folder / str(step), place / str(step), COMPLETE)
      warn(
        f'checkpoint {self.folder}/{step} is damaged ({reason}): moved to '
        f'{place}, {then}'
      )
    if damaged:
      self.gather('moving damaged checkpoints')
      self.manager.reload()

  def delete(self, step: int) -> None:
    """Deletes a step.

    In a bucket it first counts as incomplete: its objects go one by one, and a
    kill on the way would leave it looking whole.
    """
    if self._coordinator.index == 0 and buckets.in_bucket(self.folder):
      (self.folder / str(step) / COMPLETE).unlink(missing_ok=True)
    self.manager.delete(step)

  def note_failure(self) -> None:
    """Lets what Orbax does later print nothing."""
    self._quiet.failed = True

  def check_reachable(self, error: Exception, doing: str) -> None:
    """Tells a bucket that does not answer from a damaged checkpoint.

    Raises:
      CheckpointError: it does not answer.
    """
    reason = buckets.in_bucket(self.folder) and buckets.unreachable(error)
    if reason:
      self.note_failure()
      raise CheckpointError(refusal(doing, reason)) from error

  @contextlib.contextmanager
  def explained(self, doing: str):
    """Turns what a disk or bucket refuses into a CheckpointError."""
    try:
      with explained(doing, self.folder):
        yield
    except CheckpointError:
      self.note_failure()
      raise
