"""config.json of our folders as vLLM wants it, and settings it must have."""

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from qwenvl_jax.serve.vllm_plugin import ARCHITECTURE, MODE

# What vLLM would read otherwise than we do; the model reads the file itself.
_UNREAD = ('rotary_emb_base', 'rotary_pct', 'auto_map')


class CheckpointConfig(PretrainedConfig):
  """The released config.json, which all layouts have.

  One without `visual`, of Qwen-7B, stays what it is.
  """

  model_type = 'qwen'

  def __init__(self, **kwargs):
    visual = kwargs.get('visual')
    if visual is not None:
      for name in _UNREAD:
        kwargs.pop(name, None)
      # Of Int4, which is dequantized as by `qwenvl_jax.load`.
      if kwargs.pop('quantization_config', None):
        kwargs.pop('torch_dtype', None)
        kwargs['dtype'] = 'bfloat16'
      kwargs['architectures'] = [ARCHITECTURE]
      kwargs['head_dim'] = kwargs['kv_channels']
      # NTK frequencies follow from the length of a whole prompt, which vLLM
      # neither tells nor keeps apart in its cache of prefixes.
      kwargs['max_position_embeddings'] = kwargs['seq_length']
    super().__init__(**kwargs)


class Defaults(VerifyAndUpdateConfig):
  """What nobody should have to say on the command line."""

  @staticmethod
  def verify_and_update_model_config(model_config) -> None:
    """Takes our tokenizer and form of messages, and no kernels of 4 bits."""
    if model_config.tokenizer_mode == 'auto':
      model_config.tokenizer_mode = MODE
    if getattr(model_config.hf_config, 'quantization_config', None):
      del model_config.hf_config.quantization_config
      model_config.model_arch_config.quantization_config = None

  @staticmethod
  def verify_and_update_config(vllm_config) -> None:
    """A picture is read in one piece, as tpu-inference needs it."""
    vllm_config.scheduler_config.disable_chunked_mm_input = True
