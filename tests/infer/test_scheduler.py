"""Who is answered when; and that nobody notices who else is."""

import collections
import dataclasses
import gc
import random
import threading

import jax
import numpy as np
import pytest
import toy

from qwenvl_jax.errors import DataError, QwenVLError
from qwenvl_jax.infer.programs import programs
from qwenvl_jax.infer.request import GenerationError, Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Load, QueueFullError, Scheduler

SLOTS = 4
# What may fail, and how.
PROGRAMS = ('encode', 'prefill', 'insert', 'choose', 'forward')
OUT_OF_MEMORY = RuntimeError('out of memory')
IDLE = Load(waiting=0, running=0, tokens=0, free=SLOTS)


@pytest.fixture(scope='module')
def engine():
  """Everything that requests may need is compiled."""
  # Those of other tests do not count.
  programs.cache_clear()
  made = toy.engine(slots=SLOTS, max_len=3072, chunk=512, images=8)
  Scheduler(made).warm_up()
  return made


class Clock:
  """Seconds that pass when a test says so."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def ask(length=20, seed=0, pictures=(), **settings):
  """A request; of each picture its number."""
  settings = {'max_new_tokens': 4} | settings
  return Request.create(
    toy.config(),
    toy.prompt(seed, length, len(pictures)),
    [toy.picture(number) for number in pictures],
    **settings,
  )


def finish(scheduler, steps=10_000):
  """Steps until nothing is left to do; returns how many that were."""
  for count in range(steps):
    if not scheduler.step():
      return count
  raise AssertionError(f'still busy after {steps} steps: {scheduler.load}')


def alone(engine, request):
  """The answer of a scheduler that was never asked anything else."""
  scheduler = Scheduler(engine)
  answer = scheduler.submit(request)
  finish(scheduler)
  return answer


def held(scheduler):
  """Images that are in use."""
  return sum(scheduler._bank._holders.values())


def assert_idle(scheduler):
  assert scheduler.load == IDLE
  assert sorted(scheduler._free) == list(range(SLOTS))
  assert held(scheduler) == 0
  assert (scheduler._masks == 0xFFFFFFFF).all()
  assert not np.asarray(scheduler._state.active).any()


# -- What a request gets does not depend on the others.


def random_sampling(rng) -> Sampling:
  """Greedy or not, with any of the other settings."""
  settings = {
    'top_k': rng.choice([0, 0, 3, 50]),
    'top_p': rng.choice([1.0, 1.0, 0.3, 0.9]),
    'min_p': rng.choice([0.0, 0.0, 0.1]),
    'repetition_penalty': rng.choice([1.0, 1.0, 1.3]),
    'presence_penalty': rng.choice([0.0, 0.0, 0.5]),
    'frequency_penalty': rng.choice([0.0, 0.0, 1.5]),
    'logit_bias': rng.choice([{}, {}, {5: 3.0, 17: -100.0}]),
    'min_new_tokens': rng.choice([0, 0, 3]),
    'stop_ids': tuple(rng.sample(range(toy.IMAGE_START), rng.choice([0, 16]))),
    'seed': rng.choice([rng.randrange(2**70), (rng.randrange(9), 1)]),
  }
  return Sampling(rng.choice([0.0, 0.7, 1.5]), **settings)


def random_request(seed: int) -> Request:
  """Of 1 to 3,000 tokens, short ones more often, with up to 3 pictures."""
  rng = random.Random(seed)
  edges = [1, 32, 33, 384, 385, 512, 513, 768, 769, 3000]
  length = edges[seed] if seed < len(edges) else int(3000 ** rng.random())
  most = min(3, (length - 1) // len(toy.SPAN))
  return ask(
    length,
    seed,
    [rng.randrange(6) for _ in range(rng.randint(0, most))],
    max_new_tokens=rng.randint(1, 12),
    sampling=random_sampling(rng),
    top_logprobs=rng.choice([None, None, None, 0, 5]),
  )


@pytest.fixture(scope='module')
def pool(engine):
  """Requests, and the answer that each gets alone."""
  requests = [random_request(seed) for seed in range(40)]
  return [(request, alone(engine, request)) for request in requests]


def test_the_pool_is_worth_asking(pool):
  requests = [request for request, _ in pool]
  assert sum(len(r.tokens) > 384 for r in requests) >= 10
  assert {len(r.images) for r in requests} == {0, 1, 2, 3}
  assert sum(r.sampling.temperature > 0 for r in requests) >= 15
  reasons = collections.Counter(answer.finish_reason for _, answer in pool)
  assert reasons.keys() == {'stop', 'length'}
  ids = [tuple(answer.ids) for _, answer in pool if len(answer.ids) > 3]
  assert len(set(ids)) == len(ids) >= 25


def run_schedule(rng, scheduler, clock, pool):
  """Requests come, some are taken back or time out; checks what all got."""
  coming = []
  for _ in range(rng.randint(2, 7)):
    request, expected = rng.choice(pool)
    arrival = rng.randint(0, 10)
    fate = rng.choice(['stays'] * 6 + ['cancelled', 'timeout'])
    if fate == 'timeout':
      request = dataclasses.replace(request, timeout=rng.randint(1, 8))
    leaves = arrival + rng.randint(0, 12) if fate == 'cancelled' else None
    coming.append((arrival, leaves, request, expected))
  answers = [None] * len(coming)
  step, busy = 0, True
  while busy or step <= 10:
    for number, (arrival, leaves, request, _) in enumerate(coming):
      if arrival == step:
        answers[number] = scheduler.submit(request)
      if leaves == step:
        scheduler.cancel(answers[number])
    busy = scheduler.step()
    step += 1
    clock.now += 1.0
    assert step < 200
  for answer, (_, leaves, request, expected) in zip(answers, coming):
    reason, count = answer.finish_reason, len(answer.ids)
    assert answer.error is None
    if reason in ('cancelled', 'timeout'):
      assert (leaves if reason == 'cancelled' else request.timeout) is not None
      assert answer.ids == expected.ids[:count]
    else:
      assert (answer.ids, reason) == (expected.ids, expected.finish_reason)
    if request.top_logprobs is not None:
      for token, known in zip(answer.tokens, expected.tokens):
        assert token.logprob == pytest.approx(known.logprob, abs=1e-4)
        assert [i for i, _ in token.top] == [i for i, _ in known.top]
  assert_idle(scheduler)
  return collections.Counter(answer.finish_reason for answer in answers)


@pytest.mark.slow
def test_each_gets_what_it_gets_alone(engine, pool):
  """300 schedules of arrivals, cancellations and time-outs."""
  rng, reasons = random.Random(0), collections.Counter()
  for budget in (None, 1, 600, 3000):
    clock = Clock()
    scheduler = Scheduler(engine, read_tokens=budget, clock=clock)
    for _ in range(75):
      reasons += run_schedule(rng, scheduler, clock, pool)
  # Each kind of end came often enough to mean something.
  assert reasons['cancelled'] > 50
  assert reasons['timeout'] > 30
  assert min(reasons['stop'], reasons['length']) > 100


# -- Nothing compiles once all is warmed up.


class Letters:
  """A grammar: so many ids of a few, then the end."""

  finished = False

  def __init__(self, allowed, length=3, fails_at=None, error=None):
    self.allowed, self.left = tuple(allowed), length
    self.fails_at, self.error = fails_at, error
    self.calls = 0

  def fill(self, mask):
    mask[:] = 0
    self.calls += 1
    if self.calls == self.fails_at:
      raise self.error or GenerationError('the grammar is lost')
    for token in self.allowed:
      mask[token // 32] |= np.uint32(1 << token % 32)

  def accept(self, token):
    assert token in self.allowed
    self.left -= 1
    self.finished = not self.left


@pytest.fixture
def compilations():
  """Names of what JAX traces, lowers or compiles, as it does."""
  heard = []

  def listener(name, seconds, **_):
    if name.startswith('/jax/core/compile'):
      heard.append(name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  yield heard
  jax.monitoring.unregister_event_duration_listener(listener)


def fail_once(monkeypatch, engine, name, error=OUT_OF_MEMORY):
  """The program runs, and what it made is lost."""
  real, failed = getattr(engine, name), []

  def program(*arguments):
    result = real(*arguments)
    if not failed:
      failed.append(name)
      raise error
    return result

  monkeypatch.setattr(engine, name, program)


def test_nothing_compiles_after_warm_up(engine, compilations, monkeypatch):
  known = programs(engine.config, None)
  before = known.compiled()
  assert before < 65
  scheduler, rng = Scheduler(engine), random.Random(1)
  lengths = [*engine.program_lengths(), 1, 31, 511, 513, 1100, 2999]
  lengths += [int(3000 ** rng.random()) for _ in range(20)]
  answers = []
  for seed, length in enumerate(min(n, 3000) for n in lengths):
    most = min(3, (length - 1) // len(toy.SPAN))
    request = ask(
      length,
      seed,
      [rng.randrange(20) for _ in range(rng.randint(0, most))],
      sampling=random_sampling(rng),
      top_logprobs=rng.choice([None, 0, 20]),
      matcher=Letters([3, 250]) if seed % 5 == 0 else None,
    )
    answers.append(scheduler.submit(request))
    scheduler.step()
    if seed % 7 == 3:
      scheduler.cancel(rng.choice(answers))
  finish(scheduler)
  # What goes wrong, too.
  params = engine.params
  for token in (1, 2):
    monkeypatch.setattr(engine, 'params', toy.damaged(params, token))
    answers.append(scheduler.submit(ask(40, 1)))
    answers.append(alone(engine, Request.create(toy.config(), [token])))
    assert 'not finite' in str(answers[-1].error)
  monkeypatch.setattr(engine, 'params', params)
  answers.append(scheduler.submit(ask(600, matcher=Letters([3], fails_at=1))))
  finish(scheduler)
  for name in PROGRAMS:
    with monkeypatch.context() as patch:
      fail_once(patch, engine, name)
      for pictures in ([30], [31]):
        scheduler.submit(ask(40, 1, pictures))
      finish(scheduler)
  assert_idle(scheduler)
  assert all(answer.finished for answer in answers)
  assert known.compiled() == before
  assert compilations == []
  # There would have been something to hear.
  jax.jit(lambda x: x + 1)(np.ones(3))
  assert compilations


# -- Whatever is asked, nothing is lost.


BAD_TOKEN = 7


def random_kind(rng, seed, clock):
  """One of many requests, good or bad, and what it may end as."""
  length = rng.choice([1, 5, 20, 30, 40, 90])
  settings = {'max_new_tokens': rng.randint(1, 4)}
  tokens = [8 if x == BAD_TOKEN else x for x in toy.prompt(seed, length)]
  sampling = {'temperature': rng.choice([0.0, 1.0]), 'seed': seed}
  sampling['logit_bias'] = {BAD_TOKEN: -100}
  images = None
  kind = rng.choice(KINDS)
  match kind:
    case 'too long':
      tokens = tokens * 3072
    case 'no room':
      settings['max_new_tokens'] = 3072
    case 'empty':
      tokens = []
    case 'unknown id':
      tokens[-1] = toy.VOCABULARY
    case 'cut span':
      tokens = toy.SPAN[:9]
    case 'unknown stop id':
      sampling['stop_ids'] = (toy.VOCABULARY,)
    case 'bad temperature':
      sampling['temperature'] = rng.choice([1e-40, -1.0, float('nan')])
    case 'bad top_p':
      sampling['top_p'] = rng.choice([0.0, 1.5])
    case 'no images':
      tokens = [*toy.SPAN, *tokens]
    case 'too many images':
      tokens = [*toy.SPAN * 9, *tokens]
      images = [toy.picture(seed)] * 9
    case 'image without colours':
      tokens, images = [*toy.SPAN, *tokens], [np.zeros((28, 28), np.uint8)]
    case 'image of half a patch':
      tokens, images = [*toy.SPAN, *tokens], [toy.picture(1, side=21)]
    case 'image':
      tokens, images = [*toy.SPAN, *tokens], [toy.picture(seed % 300)]
    case 'not finite':
      tokens[rng.randrange(len(tokens))] = BAD_TOKEN
    case 'grammar':
      settings['matcher'] = Letters([3, 4, 5], length=2)
    case 'lost grammar':
      settings['matcher'] = Letters([3, 4], 9, fails_at=rng.randint(1, 2))
      settings['max_new_tokens'] = 9
    case 'timeout':
      settings['timeout'] = rng.choice([0.5, 1, 2, 3])
    case 'long':
      tokens = tokens * 20
  request = Request.create(
    toy.config(), tokens, images, sampling=Sampling(**sampling), **settings
  )
  return kind, request


KINDS = [
  *['good'] * 4,
  *('image', 'grammar', 'cancelled', 'timeout', 'deaf', 'long'),
  *('too long', 'no room', 'empty', 'unknown id', 'cut span'),
  *('unknown stop id', 'bad temperature', 'bad top_p', 'no images'),
  *('too many images', 'image without colours', 'image of half a patch'),
  *('not finite', 'lost grammar'),
]

# Why requests of a kind may end, once they were taken.
ENDS = {
  'cancelled': {'cancelled', 'length'},
  'timeout': {'timeout', 'length'},
  'deaf': {'cancelled', 'length'},
  'grammar': {'stop', 'length'},
  'not finite': {'error'},
  'lost grammar': {'error'},
}


def deaf(answer):
  raise RuntimeError('the connection is gone')


def ask_many(scheduler, clock, count, rng, seen):
  """Asks so many of all kinds, in waves that fill the queue."""
  taken = []
  for seed in range(count):
    kind = None
    try:
      kind, request = random_kind(rng, seed, clock)
      listener = deaf if kind == 'deaf' else None
      answer = scheduler.submit(request, listener)
    except QwenVLError as error:
      assert '\n' not in str(error)
      seen[type(error).__name__] += 1
    else:
      taken.append((kind, answer))
      if kind == 'cancelled' and rng.random() < 0.5:
        scheduler.cancel(answer)
    if rng.random() < 0.3:
      clock.now += 1
      scheduler.step()
      for kind, answer in taken[-3:]:
        if kind == 'cancelled':
          scheduler.cancel(answer)
    if len(taken) > 50 or seed == count - 1:
      finish(scheduler)
      for kind, answer in taken:
        assert answer.finish_reason in ENDS.get(kind, {'length'}), kind
        assert (answer.error is not None) == (answer.finish_reason == 'error')
        seen[answer.finish_reason] += 1
      taken.clear()


def live_arrays():
  gc.collect()
  arrays = jax.live_arrays()
  return len(arrays), sum(x.nbytes for x in arrays)


def resident_bytes():
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_ten_thousand_requests_good_and_bad(engine, monkeypatch):
  monkeypatch.setattr(engine, 'params', toy.damaged(engine.params, BAD_TOKEN))
  clock, seen = Clock(), collections.Counter()
  scheduler = Scheduler(engine, max_waiting=12, clock=clock)
  ask_many(scheduler, clock, 300, random.Random(0), seen)
  before, resident = live_arrays(), resident_bytes()
  ask_many(scheduler, clock, 10_000, random.Random(1), seen)
  assert sum(seen.values()) == 10_300
  for end in ('length', 'stop', 'cancelled', 'timeout', 'error'):
    assert seen[end] > 200, end
  assert seen['DataError'] > 3000
  assert seen['ConfigError'] > 1000
  assert seen['QueueFullError'] > 20
  assert_idle(scheduler)
  assert live_arrays() == before
  # Allocators keep some; a request more a step would be gigabytes.
  assert resident_bytes() - resident < 2**27


# -- Who is answered when.


@pytest.fixture
def scheduler(engine):
  made = Scheduler(engine)
  yield made
  finish(made)
  assert_idle(made)


def test_arrival_order_is_kept(scheduler):
  began = []

  def listener(answer):
    if len(answer.tokens) == 1 and answer not in began:
      began.append(answer)

  answers = [
    scheduler.submit(ask(length, length), listener)
    for length in (700, 20, 90, 5, 300, 1, 40, 20, 600, 33)
  ]
  scheduler.cancel(answers[6])
  finish(scheduler)
  assert began == [a for n, a in enumerate(answers) if n != 6]


def test_running_answers_go_on_while_a_long_prompt_is_read(scheduler, engine):
  """One chunk of it, or one image, before each of their tokens."""
  first = scheduler.submit(ask(20, max_new_tokens=30))
  scheduler.step()
  long = scheduler.submit(ask(3000, 1, max_new_tokens=2))
  pieces = len(engine.pieces(3000))
  assert pieces == 6
  for step in range(1, pieces):
    scheduler.step()
    assert len(first.tokens) == 1 + step
    assert not long.tokens
  scheduler.step()
  assert (len(first.tokens), len(long.tokens)) == (1 + pieces, 1)
  # Short prompts fill what the budget leaves.
  short = [scheduler.submit(ask(20, seed)) for seed in range(2)]
  scheduler.step()
  assert [len(answer.tokens) for answer in short] == [1, 1]


def test_images_count_in_the_budget(engine):
  """As the patches that are encoded for them: 4 here."""
  scheduler = Scheduler(engine, read_tokens=4)
  answer = scheduler.submit(ask(60, 1, [0, 1, 0], max_new_tokens=1))
  # Two are encoded, the third is known.
  assert finish(scheduler) == 3
  assert answer.finish_reason == 'length'
  again = scheduler.submit(ask(60, 1, [0, 1, 0], max_new_tokens=1))
  assert finish(scheduler) == 1
  assert again.ids == answer.ids


def test_a_cancelled_answer_gets_no_more_and_frees_its_slot(scheduler):
  answers = [scheduler.submit(ask(20, n, max_new_tokens=9)) for n in range(3)]
  reading = scheduler.submit(ask(3000, 4, [0], max_new_tokens=9))
  waiting = scheduler.submit(ask(20, 5))
  scheduler.step()
  scheduler.step()
  assert scheduler.load.running == SLOTS
  assert scheduler.load.waiting == 1
  assert held(scheduler) == 1
  for answer in (answers[1], reading, waiting):
    known = len(answer.tokens)
    scheduler.cancel(answer)
    scheduler.step()
    assert answer.finish_reason == 'cancelled'
    assert len(answer.tokens) == known
  assert scheduler.load == Load(0, 2, 2 * (20 + 5), 2)
  assert held(scheduler) == 0
  # One that is over stays as it was.
  finish(scheduler)
  scheduler.cancel(answers[0])
  scheduler.step()
  assert answers[0].finish_reason == 'length'


def test_time_outs(engine):
  """In the queue, while it is read, and while it is answered."""
  clock = Clock()
  scheduler = Scheduler(engine, clock=clock)
  running = [
    scheduler.submit(ask(20, n, timeout=3, max_new_tokens=9)) for n in range(3)
  ]
  reading = scheduler.submit(ask(3000, 4, timeout=3, max_new_tokens=9))
  waiting = scheduler.submit(ask(20, 5, timeout=3))
  patient = scheduler.submit(ask(20, 6))
  for clock.now in (0.0, 1.0, 2.9):
    scheduler.step()
  assert not any(answer.finished for answer in (*running, reading, waiting))
  clock.now = 3.0
  scheduler.step()
  for answer in (*running, reading, waiting):
    assert answer.finish_reason == 'timeout'
    assert answer.error is None
  assert [len(answer.tokens) for answer in running] == [3, 3, 3]
  finish(scheduler)
  assert patient.finish_reason == 'length'
  assert_idle(scheduler)


def test_a_full_queue(engine):
  scheduler = Scheduler(engine, max_waiting=2, max_waiting_tokens=50)
  # One alone is always taken, however long.
  answers = [scheduler.submit(ask(3000))]
  with pytest.raises(QueueFullError, match='row 7: 3000 tokens .* of 50'):
    scheduler.submit(ask(1), name='row 7')
  scheduler.step()
  answers += [scheduler.submit(ask(20)), scheduler.submit(ask(20))]
  with pytest.raises(QueueFullError, match='2 requests are waiting of 2'):
    scheduler.submit(ask(1))
  scheduler.cancel(answers[1])
  scheduler.step()
  with pytest.raises(QueueFullError, match='20 tokens are waiting of 50'):
    scheduler.submit(ask(31))
  answers.append(scheduler.submit(ask(30)))
  finish(scheduler)
  assert_idle(scheduler)
  reasons = [answer.finish_reason for answer in answers]
  assert reasons == ['length', 'cancelled', 'length', 'length']


def test_what_never_fits_is_refused_at_once(scheduler):
  with pytest.raises(DataError, match='row 3: 3072 tokens'):
    scheduler.submit(ask(3072), name='row 3')
  with pytest.raises(DataError, match='at most 72'):
    scheduler.submit(ask(3000, max_new_tokens=73))
  with pytest.raises(DataError, match='9 images are more than the 8'):
    scheduler.submit(ask(300, pictures=range(9)))


def test_a_listener_that_fails_ends_its_answer_only(engine, scheduler):
  gone = scheduler.submit(ask(20, 1, max_new_tokens=9), deaf)
  other = scheduler.submit(ask(20, 2))
  finish(scheduler)
  assert gone.finish_reason == 'cancelled'
  assert len(gone.tokens) < 9
  assert other.ids == alone(engine, ask(20, 2)).ids


def test_a_listener_may_ask_the_next_question(scheduler):
  answers = []

  def listener(answer):
    if answer.finished and len(answers) < 5:
      answers.append(scheduler.submit(ask(20, len(answers)), listener))

  answers.append(scheduler.submit(ask(20), listener))
  finish(scheduler)
  assert [answer.finish_reason for answer in answers] == ['length'] * 5


def test_others_may_ask_and_cancel_while_a_thread_runs(engine, pool):
  scheduler, stop = Scheduler(engine), threading.Event()
  runner = threading.Thread(target=scheduler.run, args=(stop,))
  runner.start()
  asked, done = [], threading.Semaphore(0)

  def listener(answer):
    if answer.finished:
      done.release()

  def client(seed):
    rng = random.Random(seed)
    for _ in range(15):
      request, expected = rng.choice(pool)
      answer = scheduler.submit(request, listener)
      cancelled = rng.random() < 0.3
      if cancelled:
        scheduler.cancel(answer)
      asked.append((answer, expected, cancelled))
      assert scheduler.load.free <= SLOTS

  clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
  try:
    for thread in clients:
      thread.start()
    for _ in range(4 * 15):
      assert done.acquire(timeout=60)
  finally:
    stop.set()
    runner.join(timeout=60)
  assert not runner.is_alive()
  for answer, expected, cancelled in asked:
    if answer.finish_reason == 'cancelled':
      assert cancelled
      assert answer.ids == expected.ids[: len(answer.ids)]
    else:
      assert answer.ids == expected.ids
  assert_idle(scheduler)


# -- Grammars.


def test_an_answer_follows_its_grammar(engine, scheduler):
  allowed = [3, 64, 319]
  sampling = Sampling(1.5, seed=1)
  ruled = ask(20, 1, matcher=Letters(allowed, 3), sampling=sampling)
  plain = ask(20, 1, sampling=sampling, max_new_tokens=9)
  answers = [scheduler.submit(request) for request in (ruled, plain)]
  finish(scheduler)
  assert set(answers[0].ids) <= set(allowed)
  assert len(answers[0].ids) == 3
  assert answers[0].finish_reason == 'stop'
  assert answers[1].ids == alone(engine, plain).ids


@pytest.mark.parametrize('error', [None, ValueError('no such state')])
@pytest.mark.parametrize('call', [1, 2, 3])
def test_a_grammar_that_fails_ends_its_answer_only(
  engine, scheduler, call, error
):
  failing = ask(20, 1, matcher=Letters([3], 9, call, error), max_new_tokens=9)
  answer = scheduler.submit(failing)
  other = scheduler.submit(
    ask(20, 2, matcher=Letters([5], 8), max_new_tokens=9)
  )
  while not answer.finished:
    scheduler.step()
  assert isinstance(answer.error, GenerationError)
  assert answer.ids == [3] * (call - 1 - (call > 1))
  # Nothing of it is left in the slot, while another grammar is at work.
  again = [scheduler.submit(ask(20, n)) for n in range(3)]
  finish(scheduler)
  assert other.ids == [5] * 8
  for n in range(3):
    assert again[n].ids == alone(engine, ask(20, n)).ids


def test_nothing_may_follow(scheduler):
  """The grammar has nothing but the end, and that is too early."""
  sampling = Sampling(stop_ids=(9,), min_new_tokens=5)
  request = ask(20, matcher=Letters([9], 99), sampling=sampling)
  answer = scheduler.submit(request)
  finish(scheduler)
  assert 'no token may follow after 0' in str(answer.error)


# -- Images.


def count_encoded(monkeypatch, engine):
  """Places of the images that are encoded from now on."""
  encoded, real = [], engine.encode

  def encode(bank, pixels, places):
    encoded.extend(places)
    return real(bank, pixels, places)

  monkeypatch.setattr(engine, 'encode', encode)
  return encoded


def test_many_questions_about_a_picture_encode_it_once(
  engine, scheduler, monkeypatch
):
  encoded = count_encoded(monkeypatch, engine)
  questions = [ask(40 + n, n, [n % 2]) for n in range(6)]
  answers = [scheduler.submit(question) for question in questions]
  finish(scheduler)
  assert len(encoded) == 2
  assert len({tuple(answer.ids) for answer in answers}) == 6
  # What one may see is not told to another by the time it takes.
  for salt, count in ((b'a', 3), (b'a', 3), (b'b', 4)):
    scheduler.submit(dataclasses.replace(questions[0], salt=salt))
    finish(scheduler)
    assert len(encoded) == count


def test_more_pictures_than_places(engine, scheduler, monkeypatch):
  encoded = count_encoded(monkeypatch, engine)
  questions = [ask(80, n, [n, n + 1, n + 2]) for n in range(12)]
  answers = [scheduler.submit(question) for question in questions]
  finish(scheduler)
  # Each once: neighbours share two.
  assert len(encoded) == 14
  assert set(encoded) <= set(range(8))
  for question, answer in zip(questions[::5], answers[::5]):
    assert answer.ids == alone(engine, question).ids
  last = len(encoded)
  scheduler.submit(questions[-1])
  finish(scheduler)
  assert len(encoded) == last
  scheduler.submit(questions[0])
  finish(scheduler)
  assert len(encoded) == last + 3


# -- What fails.


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_that_fails(engine, scheduler, monkeypatch, name):
  """Those it worked for hear of it; the next are answered as ever."""
  expected = [alone(engine, ask(60, n, [n])).ids for n in range(3)]
  running = scheduler.submit(ask(60, 0, [0], max_new_tokens=9))
  scheduler.step()
  with monkeypatch.context() as patch:
    fail_once(patch, engine, name)
    other = scheduler.submit(ask(60, 1, [1]))
    finish(scheduler)
  failed = running if name in ('choose', 'forward') else other
  assert 'out of memory' in str(failed.error)
  if name in ('encode', 'prefill'):
    assert running.finish_reason == 'length'
  assert_idle(scheduler)
  again = [scheduler.submit(ask(60, n, [n])) for n in range(3)]
  finish(scheduler)
  assert [answer.ids for answer in again] == expected


@pytest.mark.parametrize('name', ['prefill', 'insert', 'choose', 'forward'])
def test_an_interrupt_passes_and_loses_nothing(
  engine, scheduler, monkeypatch, name
):
  expected = alone(engine, ask(60, 1, [1])).ids
  with monkeypatch.context() as patch:
    fail_once(patch, engine, name, KeyboardInterrupt())
    answer = scheduler.submit(ask(60, 1, [1]))
    with pytest.raises(KeyboardInterrupt):
      finish(scheduler)
  assert answer.finish_reason == 'error'
  assert_idle(scheduler)
  again = scheduler.submit(ask(60, 1, [1]))
  finish(scheduler)
  assert again.ids == expected
