import dataclasses

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import jobs, plan_cache, search, topology
from qwenvl_jax.plan.memory import Sizes, lower_bound
from qwenvl_jax.plan.plan import Plan

GIB = 2**30


@pytest.fixture
def compiled(monkeypatch):
  """Stands in for the compiler, which takes minutes; lists what it is asked.

  Memory is half a GiB for each row a shard more than is there, and twice that
  without remat; a step takes as many seconds as microbatches.
  """
  asked = []

  def make_plan(job, wanted):
    asked.append(job)
    rows = job.work.rows / job.accumulation / job.mesh.devices.size
    peak = rows * GIB / 2 * (2 if job.config.remat == 'none' else 1)
    figures = {field.name: None for field in dataclasses.fields(Plan)}
    figures |= {
      'fits': peak <= GIB,
      'peak_hbm_bytes': peak,
      'accumulation': job.accumulation,
      'estimated_step_seconds': float(job.accumulation),
    }
    return Plan(**figures)

  monkeypatch.setattr(plan_cache, 'make_plan', make_plan)
  return asked


def run(config, pod, folder, budget):
  wanted, devices = pod
  return list(search.search(config, wanted, devices, folder, budget))


@pytest.fixture
def config(configured):
  return configured('stage2.gin', 'Pipeline.batch_size=16')


def test_candidates_divide(config):
  wanted = topology.parse('v5e:2x2', slices=2)
  found = search.candidates(config, wanted)
  assert len(set(found)) == len(found)
  for one in found:
    assert one.data * one.fsdp * one.tensor == 8
    assert one.data % 2 == 0  # Parameters are not split over slices.
    assert 2 % one.tensor == 0  # Two heads.
    assert one.data * one.fsdp * one.accumulation * one.rows == 16
    # Two axes to split parameters by where they lie on both sides of a slice.
    assert one.inner == (2 if one.fsdp == 4 else 1)


def test_what_fits_is_ranked_by_time(config, pod, compiled, tmp_path):
  found = run(config, pod('v5e:2x2'), tmp_path, 60)
  ranked = search.rank(found)
  times = [plan.estimated_step_seconds for _, plan in ranked]
  assert times == sorted(times) and ranked
  assert all(plan.fits for _, plan in ranked)
  # Two rows a shard fit with remat, four do not.
  assert all(c.rows * c.data * c.fsdp <= 2 * 4 for c, _ in ranked)


def test_what_does_not_fit_rules_out_what_needs_more(
  config, pod, compiled, tmp_path
):
  found = run(config, pod('v5e:2x2'), tmp_path, 12)
  assert any(not plan.fits for _, plan in found)
  tried = [candidate for candidate, _ in found]
  for number, (candidate, plan) in enumerate(found):
    if not plan.fits:
      later = tried[number + 1 :]
      assert not any(other.needs_more_than(candidate) for other in later)


def test_an_interrupted_search_goes_on(config, pod, compiled, tmp_path):
  first = run(config, pod('v5e:2x2'), tmp_path, 2)
  assert len(compiled) == 2
  again = run(config, pod('v5e:2x2'), tmp_path, 3)
  assert len(compiled) == 3
  assert again[:2] == first


def test_answers_belong_to_a_configuration_and_a_topology(
  config, pod, compiled, tmp_path
):
  run(config, pod('v5e:2x2'), tmp_path, 1)
  run(config, pod('v6e:2x2'), tmp_path, 1)
  other = dataclasses.replace(
    config, data=dataclasses.replace(config.data, sequence_length=128)
  )
  run(other, pod('v5e:2x2'), tmp_path, 1)
  assert len(compiled) == 3


def test_overrides_say_what_was_tried(config):
  one = search.Candidate(2, 4, 1, 2, 4, 'dots', inner=2)
  assert one.overrides == [
    '--gin.MeshConfig.data=2',
    '--gin.MeshConfig.fsdp=4',
    '--gin.MeshConfig.tensor=1',
    '--gin.MeshConfig.inner=2',
    '--gin.TrainConfig.accumulation=2',
    '--gin.QwenVLConfig.remat=\'"dots"\'',
    '--gin.QwenVLConfig.vision_remat=None',
  ]
  changed = one.apply(config)
  assert changed.mesh.sizes(8)[:3] == (2, 4, 1)
  assert changed.accumulation == 2
  assert changed.objective.config.remat == 'dots'
  full = dataclasses.replace(one, vision_remat='full')
  assert full.overrides[-1].endswith('vision_remat=\'"full"\'')
  assert full.apply(config).objective.config.vision_remat == 'full'
  assert one.needs_more_than(full) and not full.needs_more_than(one)


def test_a_model_too_large_for_the_chips_is_said(configured, pod, tmp_path):
  config = configured('stage2.gin', small=False)
  with pytest.raises(ConfigError, match='take more chips'):
    run(config, pod('v5e:2x2'), tmp_path, 1)


def test_lower_bound_of_the_full_model(configured, pod):
  """By hand: 16 bytes a parameter, layer inputs and logits of bfloat16."""
  wanted, devices = pod('v5e:16x16')
  config = configured(
    'stage2_unpacked.gin',
    'MeshConfig.tensor=1',
    'TrainConfig.accumulation=16',
    "QwenVLConfig.remat='full'",
    small=False,
  )
  params = jobs.make('train', config, devices).params
  sizes = Sizes.of(config, params)
  assert sizes.trained + sizes.frozen == 9_656_935_168
  state = (sizes.trained * 16 + sizes.frozen * 2) / 256
  kept = 2 * (2048 * (32 * 4096 + 151936) + 1024 * 48 * 1664)
  assert lower_bound(config, sizes, 256) == state + kept
