from qwenvl_jax.train.step_metrics import Window
from qwenvl_jax.train.stragglers import compare


def everyone():
  return [
    Window(0.0, waited=waited, settled=10.0 - own, taken=5).times(10.0)
    for waited, own in ((0.5, 1.0), (6.0, 8.0), (1.0, 2.0))
  ]


def test_the_slowest_host_is_the_one_that_waits_least_for_the_devices():
  found, said = compare(everyone(), lambda x: f'host {x}')
  assert found == {
    'hosts/step_seconds_min': 2.0,
    'hosts/step_seconds_median': 2.0,
    'hosts/step_seconds_max': 2.0,
    'hosts/own_seconds_min': 0.2,
    'hosts/own_seconds_median': 0.4,
    'hosts/own_seconds_max': 1.6,
    'hosts/waiting_for_data_min': 0.05,
    'hosts/waiting_for_data_median': 0.1,
    'hosts/waiting_for_data_max': 0.6,
    'hosts/slowest': 1,
  }
  assert said == 'slowest host 1, waiting for data 60%'


def test_hosts_alike_are_not_worth_a_remark():
  alike = [everyone()[0]] * 3
  assert compare(alike, str)[1] == ''
  assert compare(alike[:1], str) == ({}, '')
