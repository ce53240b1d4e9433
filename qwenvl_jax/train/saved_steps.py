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
from qwenvl_jax.train.failures import NoLateCallbacks, file_system_reason

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
      options: further fields of Orbax's `CheckpointManagerOptions`.

    Raises:
      CheckpointError: the folder cannot be opened.
    """
    self.folder = folder
    self.complete = None
    self._saving = None
    self._coordinator = coordinator
    self._first = coordinator.index == 0
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

  def save_items(self, step: int, items: dict[str, Any], **more: Any) -> None:
    """Starts saving a step; returns when its values may change again.

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
      if self._first:
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
    if self._first:
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
      then: what the run does instead.
    """
    place = self.folder.parent / f'{self.folder.name}-damaged'
    for step, reason in damaged.items():
      if self._first:
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
    if self._first and buckets.in_bucket(self.folder):
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
      raise CheckpointError(
        f'{doing} failed: {reason}. Does the bucket exist, may this account '
        'read and write its objects and see the bucket itself (roles '
        'storage.objectAdmin and storage.legacyBucketReader), and does the '
        'network reach it? Start the same command again to go on from the '
        'newest checkpoint'
      ) from error

  @contextlib.contextmanager
  def explained(self, doing: str):
    """Turns what a disk or bucket refuses into a CheckpointError."""
    try:
      yield
    except Exception as error:
      self.check_reachable(error, doing)
      reason = file_system_reason(error)
      if reason is None or buckets.in_bucket(self.folder):
        raise
      self.note_failure()
      valid = self._on_disk()
      raise CheckpointError(
        f'{doing} failed: {reason}. '
        + (
          f'Complete and valid in {self.folder}: step(s) {valid}'
          if valid
          else f'{self.folder} holds no complete step'
        )
        + '. Make room or lower CheckpointConfig.keep, then start the same '
        'command again to go on from there'
      ) from error

  def _on_disk(self) -> list[int]:
    if not self.folder.is_dir():
      return []
    names = (path.name for path in self.folder.iterdir())
    return sorted(int(name) for name in names if name.isdigit())
