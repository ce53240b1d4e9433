"""The stages at full size, compiled for their pods.

With little effort, which takes a minute or two each: what fits so is expected
to fit as it runs. `benchmarks/pod_plan.py` compiles them as they run.
"""

import pathlib

import pytest

from qwenvl_jax.plan import jobs, topology
from qwenvl_jax.plan.plan import make_plan

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# configs/topology/GENERATION_CHIPS/STAGE.gin, of which one stage a pod.
STAGES = {
  path.parent.name: path
  for path in sorted(CONFIGS.glob('topology/*_*/stage[123].gin'))
}


@pytest.mark.pods
@pytest.mark.parametrize('pod_name', STAGES)
def test_a_stage_fits_its_pod(configured, pod, pod_name):
  generation, chips = pod_name.split('_')
  name = next(
    f'{generation}:{shape}'
    for shape in topology.CHIPS[generation].topologies
    if topology.parse(f'{generation}:{shape}').chips == int(chips)
  )
  wanted, devices = pod(name)
  path = STAGES[pod_name]
  config = configured(
    path.name, files=(str(path.relative_to(CONFIGS)),), small=False
  )
  plan = make_plan(jobs.make('train', config, devices), wanted, quick=True)
  assert plan.fits, plan.advice
  assert plan.peak_hbm_bytes <= wanted.chip.hbm_bytes
  # A forward pass computed twice would be 4/3 of what the model needs.
  assert 0.95 < plan.flops_ratio < 4 / 3
  assert plan.argument_bytes < 1.06 * plan.ideal_argument_bytes
  assert not plan.unknown_kernels
