"""SIGTERM and SIGINT end a run between two steps, after saving."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

import jax

from qwenvl_jax.errors import QwenVLError


class Interrupted(QwenVLError):
  """A signal asked the run to end; it has saved.

  Attributes:
    signum: the signal.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


@dataclasses.dataclass
class Caught:
  signum: int = 0


@contextlib.contextmanager
def caught_signals() -> Iterator[Caught]:
  """Notes SIGTERM and SIGINT for the loop to act on between two steps.

  A second one ends the process at once. In a run of several processes JAX's
  preemption service takes SIGTERM; SIGINT becomes one.
  """
  caught = Caught()
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return
  if jax.process_count() > 1:
    with _as_sigterm():
      yield caught
    return
  before = {}

  def note(signum, frame):
    del frame
    caught.signum = signum
    for number, handler in before.items():
      signal.signal(number, handler)

  for number in (signal.SIGTERM, signal.SIGINT):
    before[number] = signal.signal(number, note)
  try:
    yield caught
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _as_sigterm() -> Iterator[None]:
  """The first SIGINT counts as SIGTERM."""

  def hand_on(signum, frame):
    del frame
    signal.signal(signum, before)
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.signal(signal.SIGINT, hand_on)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
