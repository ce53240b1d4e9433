"""A plugin for vLLM on TPUs: our checkpoint folders, served on many machines.

vLLM finds it by the entry point `vllm.general_plugins` of this package and
calls `register` in each of its processes, in an environment of its own
(`launch/in_env.sh vllm`). Importing this module imports nothing of vLLM.
"""

import importlib.util

# vLLM's name of the model, and of what reads its texts and messages.
ARCHITECTURE = 'QwenVLForConditionalGeneration'
MODE = 'qwenvl_jax'


def register() -> None:
  """Tells vLLM of config, tokenizer, messages, pictures and model.

  Does nothing where vLLM has no tpu-inference: the model runs in JAX.
  """
  if importlib.util.find_spec('tpu_inference') is None:
    return
  from qwenvl_jax.serve.vllm_plugin.registration import register_all

  register_all()
