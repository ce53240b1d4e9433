"""Where each part of the plugin goes into vLLM."""

from tpu_inference.models.common.model_loader import register_model
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from qwenvl_jax.serve.vllm_plugin import ARCHITECTURE, MODE
from qwenvl_jax.serve.vllm_plugin.config import CheckpointConfig, Defaults
from qwenvl_jax.serve.vllm_plugin.model import ServedQwenVL

_ROOM = 'qwenvl_jax.serve.vllm_plugin'


def register_all() -> None:
  """Registers everything; may be called again."""
  if MODE in TokenizerRegistry.tokenizers:
    return
  # All folders of ours have the released config.json, whose code vLLM would
  # otherwise ask to run.
  _CONFIG_REGISTRY[CheckpointConfig.model_type] = CheckpointConfig
  MODELS_CONFIG_MAP[ARCHITECTURE] = Defaults
  TokenizerRegistry.register(MODE, f'{_ROOM}.tokenizer', 'ServedTokenizer')
  RENDERER_REGISTRY.register(MODE, f'{_ROOM}.renderer', 'Renderer')
  register_model(ARCHITECTURE, ServedQwenVL)
