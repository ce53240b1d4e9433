"""Who is answered when: a queue in front of the engine's slots.

Plain Python around the engine. Requests are admitted in the order in which they
arrive, as slots come free. One prompt is read at a time, or a few short ones,
and a bounded number of tokens before each step of the running answers, so that
these never wait for long. Nothing that happens to one request touches another.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import (
  CANCELLED,
  ERROR,
  LENGTH,
  MAX_TOP_LOGPROBS,
  STOP,
  TIMEOUT,
  Answer,
  Request,
  check_chosen,
  check_fits,
  failed,
  not_finite,
  told_token,
)
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.state import Scores


class QueueFullError(QwenVLError):
  """A request that came while too many were waiting."""


@dataclasses.dataclass
class _Work:
  """A request on its way through the engine.

  Attributes:
    answer: to the request.
    deadline: by the scheduler's clock, None for none.
    slot: kept for it from when its prompt is read on; -1 before.
  """

  answer: Answer
  deadline: float | None
  slot: int = -1

  @property
  def request(self) -> Request:
    return self.answer.request


@dataclasses.dataclass(frozen=True)
class Load:
  """How busy a scheduler is.

  Attributes:
    waiting: requests in the queue.
    running: requests whose prompt is being read, or that are being answered.
    tokens: of the running ones, prompts and answers so far.
    free: slots.
  """

  waiting: int
  running: int
  tokens: int
  free: int


class Scheduler:
  """Answers requests.

  One thread calls `step` again and again (or `run`); any may `submit` and
  `cancel`.
  """

  def __init__(
    self,
    engine: Engine,
    *,
    max_waiting: int | None = None,
    max_waiting_tokens: int | None = None,
    read_tokens: int | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Makes all slots free.

    Args:
      max_waiting: requests that may wait; None for any number.
      max_waiting_tokens: tokens of the prompts that may wait; None for any.
      read_tokens: of prompts, before each step of the running answers; an image
        counts as its patches. None for the engine's `chunk`.
    """
    self.engine = engine
    self._bank = ImageBank(engine)
    self._state = engine.init_state()
    self._max_waiting = max_waiting
    self._max_waiting_tokens = max_waiting_tokens
    self._read_tokens = read_tokens or engine.chunk
    self._clock = clock
    self._lock = threading.Condition()
    self._waiting: collections.deque[_Work] = collections.deque()
    self._waiting_tokens = 0
    self._cancelled: set[Answer] = set()
    # Those whose prompts are being read together, and how far that is.
    self._group: list[_Work] = []
    self._reading: Reading | None = None
    self._read_slots: list[int] = []
    self._read_samplings: list[Sampling] = []
    self._running: dict[int, _Work] = {}
    self._free = list(range(engine.slots))[::-1]
    words = -(-engine.config.decoder.vocab_size // 32)
    self._masks = np.full((engine.slots, words), 0xFFFFFFFF, np.uint32)

  def submit(
    self,
    request: Request,
    listener: Callable[[Answer], None] | None = None,
    name: str = 'the prompt',
  ) -> Answer:
    """Puts a request into the queue.

    Returns:
      The answer, which grows as `step` is called.

    Raises:
      DataError: the engine has no room for such a request.
      ConfigError: there is no adapter of its name.
      QueueFullError: too many are waiting.
    """
    check_fits(request, self.engine.max_len, self.engine.images, name)
    self.engine.check_adapter(request.adapter)
    answer = Answer(request, listener)
    deadline = None
    if request.timeout is not None:
      deadline = self._clock() + request.timeout
    length = len(request.tokens)
    with self._lock:
      for limit, used, more, what in (
        (self._max_waiting, len(self._waiting), 1, 'requests'),
        (self._max_waiting_tokens, self._waiting_tokens, length, 'tokens'),
      ):
        # One request alone is always taken.
        if limit is not None and used and used + more > limit:
          raise QueueFullError(
            f'{name}: {used} {what} are waiting of {limit} that may; try again '
            'later'
          )
      self._waiting.append(_Work(answer, deadline))
      self._waiting_tokens += length
      self._lock.notify_all()
    return answer

  def cancel(self, answer: Answer) -> None:
    """Ends an answer at the next step; its slot is free at once."""
    with self._lock:
      if not answer.finished:
        self._cancelled.add(answer)
        self._lock.notify_all()

  @property
  def load(self) -> Load:
    """How busy it is now."""
    with self._lock:
      works = [*self._running.values(), *self._group]
      return Load(
        waiting=len(self._waiting),
        running=len(works),
        tokens=sum(len(w.request.tokens) + len(w.answer.tokens) for w in works),
        free=len(self._free),
      )

  def run(self, stop: threading.Event) -> None:
    """Calls `step` until `stop` is set, and waits where there is nothing."""
    while not stop.is_set():
      if not self.step():
        with self._lock:
          if not self._waiting and not self._cancelled:
            self._lock.wait(timeout=0.1)

  def step(self) -> bool:
    """Reads some of a prompt, and adds a token to every running answer.

    Returns:
      Whether there was anything to do.
    """
    self._drop()
    busy = self._read()
    if self._running:
      self._advance()
      busy = True
    return busy

  def warm_up(self, scores: bool = False) -> None:
    """Compiles everything that requests may need; nothing may be running.

    Args:
      scores: whether `prompt_logprobs` are asked for, too.
    """
    self._state, self._bank.features = self.engine.warm_up(
      self._state, self._bank.features, MAX_TOP_LOGPROBS, scores
    )

  def _drop(self) -> None:
    """Ends what was cancelled or has timed out."""
    now = self._clock()

    def reason(answer: Answer) -> str:
      left = answer in cancelled or answer.abandoned
      return CANCELLED if left else TIMEOUT

    with self._lock:
      cancelled, self._cancelled = self._cancelled, set()
      works = [*self._waiting, *self._running.values(), *self._group]
      ended = [
        (work, reason(work.answer))
        for work in works
        if work.answer in cancelled
        or work.answer.abandoned
        or (work.deadline is not None and now >= work.deadline)
      ]
    for work, why in ended:
      self._end(work, why)

  def _read(self) -> bool:
    """Reads prompts until the budget of one step is used up."""
    budget, busy = self._read_tokens, False
    while budget > 0:
      if not self._group and not self._admit():
        break
      busy = True
      try:
        budget -= self._read_on()
      except QwenVLError as error:
        self._end_group(error)
      except BaseException as error:
        # What was given to the program that failed is lost.
        self._end_group(failed(error))
        self._bank.clear()
        if self._state.cache.lengths.is_deleted():
          self._start_over(error)
        if not isinstance(error, Exception):
          raise
    return busy

  def _admit(self) -> bool:
    """Takes the next requests from the queue, if slots are free."""
    with self._lock:
      count = self._joining()
      for _ in range(count):
        work = self._waiting.popleft()
        self._waiting_tokens -= len(work.request.tokens)
        work.slot = self._free.pop()
        self._group.append(work)
    return count > 0

  def _joining(self) -> int:
    """How many of those who wait are read next, in the order of arrival."""
    rows = self.engine.read_rows
    if not self._free or not self._waiting:
      return 0
    if rows > min(len(self._free), len(self._waiting)):
      return 1
    first, *others = (
      work.request for work in itertools.islice(self._waiting, rows)
    )
    if any(one.prompt_logprobs is not None for one in (first, *others)):
      return 1
    length = len(first.tokens)
    alike = all(
      self.engine.joins(length, len(other.tokens)) for other in others
    )
    images = sum(len(request.images) for request in (first, *others))
    return rows if alike and images <= self.engine.images else 1

  def _read_on(self) -> int:
    """Reads a part of prompts; returns its cost in tokens."""
    group = self._group
    requests = [work.request for work in group]
    if self._reading is None:
      # One top-k serves all, so that it is compiled once.
      scored = requests[0].prompt_logprobs is not None
      top = MAX_TOP_LOGPROBS if scored else None
      self._reading = Reading(self.engine, self._bank, requests, top)
      self._read_slots = [work.slot for work in group]
      self._read_samplings = [request.sampling for request in requests]
    reading = self._reading
    cost = reading.step()
    if reading.finished:
      if requests[0].prompt_logprobs is not None:
        self._tell_scores(group[0])
      for work in [*group]:
        if work.request.matcher is not None:
          self._begin_grammar(work)
      if not group:
        return cost
      self._state = self.engine.insert(
        self._state, reading.prefix, self._read_slots, self._read_samplings
      )
      left = {work.slot for work in group}
      for slot in self._read_slots:
        if slot not in left:  # Its request ended while the others were read.
          self._state = self.engine.free(self._state, slot)
      with self._lock:
        self._running |= {work.slot: work for work in group}
      self._stop_reading()
    return cost

  def _tell_scores(self, work: _Work) -> None:
    """Gives an answer the scores of its prompt; ends it if that was all."""
    count = work.request.prompt_logprobs
    logprobs, ids, tops = self._reading.scores()
    work.answer.prompt_scores = Scores(
      logprobs, ids[:, :count], tops[:, :count]
    )
    if not np.all(np.isfinite(logprobs)):
      self._end(work, ERROR, not_finite(0))
    elif not work.request.max_new_tokens:
      self._end(work, LENGTH)

  def _begin_grammar(self, work: _Work) -> None:
    try:
      work.request.matcher.fill(self._masks[work.slot])
    except Exception as error:
      known = isinstance(error, QwenVLError)
      self._end(work, ERROR, error if known else failed(error))

  def _stop_reading(self) -> None:
    if self._reading is not None:
      self._reading.release()
    self._group, self._reading = [], None

  def _end_group(self, error: QwenVLError) -> None:
    for work in [*self._group]:
      self._end(work, ERROR, error)

  def _advance(self) -> None:
    """One step of all running answers."""
    works = self._running
    requests = [work.request for work in works.values()]
    tops = any(request.top_logprobs for request in requests)
    grammars = any(request.matcher for request in requests)
    try:
      self._state, chosen = self.engine.choose(
        self._state,
        self._masks.copy() if grammars else None,
        MAX_TOP_LOGPROBS if tops else 0,
      )
      self._state = self.engine.forward(self._state)
      chosen = jax.device_get(chosen)
    except BaseException as error:
      self._start_over(error)
      if not isinstance(error, Exception):
        raise
      return
    for slot, work in [*works.items()]:
      self._take(work, chosen, slot)

  def _start_over(self, error: BaseException) -> None:
    """Ends all that has begun: the state was given to a program that failed.

    What it failed on may be what an earlier one made of images or of the prompt
    that is being read.
    """
    self._state = self.engine.init_state()
    for work in [*self._running.values(), *self._group]:
      self._end(work, ERROR, failed(error))
    self._bank.clear()

  def _take(self, work: _Work, chosen, slot: int) -> None:
    """Adds a slot's token to its answer, or ends that."""
    request, token = work.request, int(chosen.tokens[slot])
    matcher, count = request.matcher, len(work.answer.tokens)
    stopped = token in request.sampling.stop_ids
    try:
      check_chosen(chosen, slot, count)
      if matcher is not None and not stopped:
        matcher.accept(token)
        if not matcher.finished:
          matcher.fill(self._masks[slot])
    except Exception as error:
      known = isinstance(error, QwenVLError)
      self._end(work, ERROR, error if known else failed(error))
      return
    if stopped:
      self._end(work, STOP)
      return
    work.answer.add(told_token(request, token, chosen, slot))
    if matcher is not None and matcher.finished:
      self._end(work, STOP)
    elif count + 1 >= request.max_new_tokens:
      self._end(work, LENGTH)

  def _end(
    self, work: _Work, reason: str, error: QwenVLError | None = None
  ) -> None:
    """Ends an answer, wherever it is, and frees what it holds."""
    with self._lock:
      if work.slot < 0:
        self._waiting.remove(work)
        self._waiting_tokens -= len(work.request.tokens)
      else:
        self._free.append(work.slot)
        self._masks[work.slot] = 0xFFFFFFFF
        if work in self._group:
          self._group.remove(work)
          if not self._group:
            self._stop_reading()
        else:
          del self._running[work.slot]
          self._state = self.engine.free(self._state, work.slot)
    work.answer.finish(reason, error)
