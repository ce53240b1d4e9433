import asyncio
import concurrent.futures
import socket
import threading
import time

import pytest

from qwenvl_jax.train import coordinator as coordinator_module
from qwenvl_jax.train.coordinator import (
  LOST,
  Coordinator,
  LostProcessError,
)


def free_port():
  with socket.socket() as free:
    free.bind(('', 0))
    return free.getsockname()[1]


@pytest.fixture(autouse=True)
def quiet_afterwards(monkeypatch):
  """Ends the threads, which would end those who do not leave by themselves."""
  loops = []
  make = asyncio.new_event_loop
  monkeypatch.setattr(
    coordinator_module.asyncio,
    'new_event_loop',
    lambda: loops.append(make()) or loops[-1],
  )
  yield
  for loop in loops:
    loop.call_soon_threadsafe(stop, loop)


def stop(loop):
  for task in asyncio.all_tasks(loop):
    task.cancel()
  loop.call_soon(loop.stop)


def until(condition):
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def connected(address):
  """A connection to who may not listen yet."""
  deadline = time.monotonic() + 10
  while True:
    try:
      return socket.create_connection(address.split(':'))
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.01)


class Group:
  """Several `Coordinator` in one process, and what each of them meets."""

  def __init__(self, count, present=None, timeout=20.0):
    self.ended = {}
    address = f'localhost:{free_port()}'
    present = range(count) if present is None else present
    self.coordinator = {x: Coordinator(x, count, self._end(x)) for x in present}
    self.met = self.all(lambda p: p.wait_for_all(address, timeout))

  def _end(self, index):
    return lambda status: self.ended.setdefault(index, status)

  def all(self, action, who=None):
    """What an action gives or raises, by process."""
    who = self.coordinator if who is None else who
    with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
      futures = {x: pool.submit(action, self.coordinator[x]) for x in who}
    return {x: f.exception() or f.result() for x, f in futures.items()}

  def crash(self, index):
    """Closes the connections of one, as the kernel does for a dead process."""
    dead = self.coordinator[index]
    dead._leaving = True
    # The loop's thread forgets a connection as soon as it is closed.
    for writer in list(dead._writers.values()):
      dead._loop.call_soon_threadsafe(writer.transport.abort)


def test_values_of_all_reach_all():
  group = Group(3)
  assert set(group.met.values()) == {None}
  for _ in range(2):
    values = group.all(lambda p: p.gather('here', {'i': p.index}))
    assert values == dict.fromkeys(range(3), [{'i': 0}, {'i': 1}, {'i': 2}])
  assert (
    group.coordinator[1].name(2) == f'process 2 of 3 ({socket.gethostname()})'
  )
  group.all(lambda p: p.leave())
  assert not group.ended


def test_those_who_do_not_arrive_are_numbered():
  group = Group(4, present=[0, 2], timeout=2.0)
  for error in group.met.values():
    assert '2 of 4 processes arrived within 2 s: missing 1, 3' in str(error)
    assert error.status == LOST


def test_a_coordinator_that_is_not_there_is_named():
  (error,) = Group(2, present=[1], timeout=0.5).met.values()
  assert 'process 1 of 2' in str(error) and 'does not answer' in str(error)
  assert 'localhost:' in str(error)


def test_strangers_are_ignored_and_wrong_numbers_refused():
  address = f'localhost:{free_port()}'
  hub = Coordinator(0, 3, print)
  met = []
  waiting = threading.Thread(
    target=lambda: met.append(hub.wait_for_all(address, 20))
  )
  waiting.start()
  stranger = connected(address)
  stranger.sendall(b'GET / HTTP/1.1\n')
  with pytest.raises(LostProcessError, match='expects 2 processes'):
    Coordinator(1, 2, print).wait_for_all(address, 20)
  one, two = Coordinator(1, 3, print), Coordinator(2, 3, print)
  first = threading.Thread(target=one.wait_for_all, args=(address, 20))
  first.start()
  until(lambda: 1 in hub._writers)
  with pytest.raises(LostProcessError, match='is there already, on'):
    Coordinator(1, 3, print).wait_for_all(address, 20)
  two.wait_for_all(address, 20)
  first.join()
  waiting.join()
  assert met == [None]


def test_who_is_started_again_before_all_are_there_is_welcome():
  address = f'localhost:{free_port()}'
  hub, one, two = everyone = [Coordinator(x, 3, print) for x in range(3)]
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    met = [pool.submit(hub.wait_for_all, address, 20)]
    with connected(address) as early:
      early.sendall(b'{"hello": 1, "count": 3, "host": "first"}\n')
      until(lambda: 1 in hub._writers)
    until(lambda: 1 not in hub._writers)
    met += [pool.submit(x.wait_for_all, address, 20) for x in (one, two)]
    assert [x.result() for x in met] == [None] * 3
    values = [pool.submit(x.gather, 'here', x.index) for x in everyone]
    assert [x.result() for x in values] == [[0, 1, 2]] * 3


@pytest.mark.parametrize('index', [0, 1])
def test_who_dies_is_named_to_all(index, monkeypatch):
  monkeypatch.setattr(coordinator_module, 'EXIT_GRACE_S', 0.1)
  group = Group(3)
  rest = [x for x in range(3) if x != index]
  group.crash(index)
  met = group.all(lambda p: p.gather('next'), rest)
  for error in met.values():
    assert str(error).startswith(f'process {index} of 3')
    assert 'is gone' in str(error) and error.status == LOST
  with pytest.raises(LostProcessError, match='is gone'):
    group.coordinator[2].check()
  # One that stands in a collective is ended.
  until(lambda: len(group.ended) == 2)
  assert {x: group.ended[x] for x in rest} == dict.fromkeys(rest, LOST)


def test_who_fails_says_why():
  group = Group(3)
  group.coordinator[2].fail('no space', 2)
  met = group.all(lambda p: p.gather('next'), [0, 1])
  for error in met.values():
    assert str(error).startswith('process 2 of 3')
    assert str(error).endswith('stopped: no space') and error.status == 2
  assert group.coordinator[1].lost_within(0) is met[1]


def test_who_does_not_come_to_a_barrier_is_named():
  group = Group(3)
  met = group.all(lambda p: p.gather('saving', timeout=0.3), [0, 2])
  for error in met.values():
    assert str(error).startswith('process 1 of 3')
    assert 'did not come to "saving" within 0.3 s' in str(error)


def test_different_places_are_told_apart():
  group = Group(2)
  met = group.all(lambda p: p.gather(f'step {p.index}'))
  for error in met.values():
    assert 'do different things' in str(error)
    assert 'step 0' in str(error) and 'step 1' in str(error)


def test_silence_counts_as_loss(monkeypatch):
  monkeypatch.setattr(coordinator_module, 'HEARTBEAT_INTERVAL_S', 0.05)
  monkeypatch.setattr(coordinator_module, 'HEARTBEAT_TIMEOUT_S', 0.5)
  group = Group(2)
  mute = group.coordinator[1]
  # A machine without power closes nothing.
  mute._send = lambda *message: None
  met = group.all(lambda p: p.gather('next'), [0])
  assert 'process 1 of 2' in str(met[0])
  assert 'has not been heard of for 0.5 s' in str(met[0])


def test_who_lives_but_does_not_go_on_is_named(monkeypatch):
  monkeypatch.setattr(coordinator_module, 'HEARTBEAT_INTERVAL_S', 0.05)
  monkeypatch.setattr(coordinator_module, 'STALL_TIMEOUT_S', 0.5)
  group = Group(3)
  for index, coordinator in group.coordinator.items():
    coordinator.heartbeat(41 if index == 2 else 42)
  met = group.all(lambda p: p.gather('next'), [0, 1])
  for error in met.values():
    assert str(error).startswith('process 2 of 3')
    assert 'has stood before step 42 for' in str(error)


def test_one_process_needs_nobody():
  alone = Coordinator()
  assert alone.gather('here', 5) == [5]
  alone.check()
  alone.leave()
  assert alone.lost_within(1) is None
