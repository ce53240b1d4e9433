"""The released PyTorch code, run for comparison."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.conversion import checkpoint_io, layout
from qwenvl_jax.errors import CheckpointError


def has_released_code(folder: Path) -> bool:
  """Whether the released modelling code lies beside the weights."""
  return (folder / 'modeling_qwen.py').exists()


def released_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
  """Logits of the released code, which this imports and runs.

  It was written for transformers 4.31. Newer ones make models without memory
  and fill in what is stored, which leaves the release's rotary and LogN tables
  empty: they are no parameters. So the model is made whole, and the weights are
  read by us, the same way under any version.

  Args:
    folder: released layout with its code. All weights are loaded; Int4 ones
      are dequantized.
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
    config = transformers.AutoConfig.from_pretrained(
      folder, trust_remote_code=True
    )
    # Unless told, the release takes the precision that suits the machine.
    config.bf16, config.fp16, config.fp32 = False, False, True
    # As new and old versions call it.
    kind = 'dtype' if hasattr(config, 'dtype') else 'torch_dtype'
    setattr(config, kind, torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(
      config, trust_remote_code=True
    )
    _fill(model, folder)
    with torch.no_grad():
      logits = model.eval()(torch.from_numpy(tokens)).logits
  except CheckpointError:
    raise
  except Exception as error:  # Code of others, made for other versions.
    raise CheckpointError(
      f'the released code in {folder} does not run here '
      f'({type(error).__name__}: {error})'
    ) from error
  return logits.float().numpy()


def _fill(model, folder: Path) -> None:
  """Reads the parameters of a torch model from a released folder."""
  import torch

  config = checkpoint_io.read_config(folder)
  tensors = checkpoint_io.look_into(folder, config).tensors
  wanted = model.state_dict()
  layout.check_shapes(
    {name: tuple(x.shape) for name, x in model.named_parameters()},
    {name: tensors[name].shape for name in wanted.keys() & tensors.keys()},
    f'the released code in {folder}',
  )
  with torch.no_grad():
    for name in wanted.keys() & tensors.keys():
      values = tensors[name].load().astype(np.float32)
      wanted[name].copy_(torch.from_numpy(values))


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
