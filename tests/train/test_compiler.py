import jax
import jax.numpy as jnp
import pytest

from qwenvl_jax.plan import topology
from qwenvl_jax.sharding import MeshConfig, batch_sharding, make_mesh
from qwenvl_jax.train.compiler import compiler_options

pytest.importorskip('libtpu')


@pytest.mark.parametrize(
  'slice_name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']
)
def test_the_compiler_knows_all_options(slice_name):
  devices = topology.devices(topology.parse(slice_name))
  mesh = make_mesh(MeshConfig(), devices)
  options = compiler_options(mesh)
  assert options
  x = jax.ShapeDtypeStruct(
    (512, 512), jnp.bfloat16, sharding=batch_sharding(mesh)
  )
  jax.jit(lambda x: x.T @ x, compiler_options=options).lower(x).compile()


def test_one_device_and_other_platforms_have_none():
  assert compiler_options(make_mesh(devices=jax.devices('cpu')[:1])) is None
