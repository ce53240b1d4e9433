"""The released PyTorch code, run for comparison."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.errors import CheckpointError


def has_released_code(folder: Path) -> bool:
  """Whether the released modelling code lies beside the weights."""
  return (folder / 'modeling_qwen.py').exists()


def released_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
  """Logits of the released code, which this imports and runs.

  Args:
    folder: released layout with its code. All weights are loaded.
    tokens: [1,T] ids; pictures are named by their path within `<img>` spans.

  Returns:
    [1,T,V] float32.

  Raises:
    CheckpointError: torch or transformers is not installed, or the code fails.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise CheckpointError(
      f'running the released code needs {error.name}: pip install '
      "'qwenvl_jax[torch]' and what the release asks for"
    ) from error
  try:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
      logits = model(torch.from_numpy(tokens)).logits
  except Exception as error:  # Code of others, made for other versions.
    raise CheckpointError(
      f'the released code in {folder} does not run here '
      f'({type(error).__name__}: {error})'
    ) from error
  return logits.float().numpy()


@contextlib.contextmanager
def fixed_picture() -> Iterator[Path]:
  """A picture file, the same each time: colours that run and a black square."""
  ramp = np.linspace(0, 255, 320).astype(np.uint8)
  pixels = np.zeros((200, 320, 3), np.uint8)
  pixels[..., 0] = ramp
  pixels[..., 1] = ramp[::-1]
  pixels[..., 2] = np.linspace(0, 255, 200).astype(np.uint8)[:, None]
  pixels[60:120, 100:160] = 0
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, 'picture.png')
    Image.fromarray(pixels).save(path)
    yield path
