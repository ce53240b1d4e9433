"""Where parameters go when a mesh is in use."""

import jax

from qwenvl_jax.batch import text_batch
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.sharding import param_shardings


def shardings_in_use(config: QwenVLConfig) -> dict | None:
  """Shardings of a model's parameters over the mesh in use.

  Returns:
    Tree like the parameters, None without a mesh (see `sharding.use_mesh`).
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return None
  boxed = jax.eval_shape(
    QwenVL(config).init, jax.random.key(0), text_batch([[0]])
  )
  return param_shardings(boxed['params'], mesh)
