import jax.numpy as jnp
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)


@pytest.mark.parametrize(
  ('kind', 'name', 'value'),
  [
    (VisionConfig, 'layers', 0),
    (VisionConfig, 'width', -16),
    (AdapterConfig, 'queries', 0),
    (DecoderConfig, 'heads', -1),
    (DecoderConfig, 'vocab_size', 0),
    (DecoderConfig, 'int4_zero_offset', -1),
    (QwenVLConfig, 'unroll', 0),
    (QwenVLConfig, 'dtype', 'fp16'),
    (QwenVLConfig, 'dtype', None),
    (QwenVLConfig, 'param_dtype', 'int32'),
    (QwenVLConfig, 'param_dtype', []),
  ],
)
def test_values_that_no_model_has(kind, name, value):
  with pytest.raises(ConfigError, match=rf'{kind.__name__}\.{name}='):
    kind(**{name: value})


def test_dtypes_have_names():
  assert QwenVLConfig(dtype='bfloat16').dtype == jnp.bfloat16
