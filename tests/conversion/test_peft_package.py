"""Adapters of ours in the `peft` package, and its own here.

The model is a tree of torch modules with the released names, shapes and values,
and the decoder's forward pass for text. Needs the extra `torch`:

  EXTRAS=dev,torch launch/test.sh tests/conversion/test_peft_package.py
"""

import copy
import warnings

import golden
import numpy as np
import pytest
import safetensors.numpy

import qwenvl_jax
from qwenvl_jax.conversion import adapters, low_rank
from qwenvl_jax.conversion.convert import to_hf
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.model.lora import LoraConfig

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

LAYERS = ('attn.c_attn', 'attn.c_proj', 'mlp.w1', 'mlp.w2', 'mlp.c_proj',
          'attn.in_proj', 'attn.out_proj', 'mlp.c_fc', 'lm_head')  # fmt: skip


class Released(torch.nn.Module):
  """The released model as far as PEFT sees it: modules by name."""

  def __init__(self, tensors):
    super().__init__()
    self.config = transformers.PretrainedConfig(tie_word_embeddings=False)
    for name, value in tensors.items():
      path, _, kind = name.rpartition('.')
      module = self
      for part in path.split('.'):
        if part not in dict(module.named_children()):
          module.add_module(part, torch.nn.Module())
        parent, module = module, getattr(module, part)
      if path.endswith('wte'):
        made = torch.nn.Embedding.from_pretrained(value)
        setattr(parent, part, made)
      elif path.endswith(LAYERS) and kind == 'weight':
        outputs, inputs = value.shape
        made = torch.nn.Linear(inputs, outputs, f'{path}.bias' in tensors)
        made.weight.data = value
        if made.bias is not None:
          made.bias.data = tensors[f'{path}.bias']
        setattr(parent, part, made)
      elif kind not in dict(module.named_parameters(recurse=False)):
        module.register_parameter(kind, torch.nn.Parameter(value))

  def prepare_inputs_for_generation(self, *args, **kwargs):
    raise NotImplementedError

  def get_input_embeddings(self):
    return self.transformer.wte

  def get_output_embeddings(self):
    return self.lm_head

  def forward(self, input_ids, **_):
    """Logits of text, [B,T] to [B,T,V]; no longer than `seq_length`."""
    decoder = golden.config().decoder
    half = decoder.head_dim // 2
    angles = torch.outer(
      torch.arange(input_ids.shape[1]),
      decoder.rope_base ** (-torch.arange(half) / half),
    ).repeat(1, 2)

    def norm(module, x):
      mean = x.square().mean(-1, keepdim=True)
      return x * torch.rsqrt(mean + decoder.norm_eps) * module.weight

    def turn(x):
      turned = torch.cat([-x[..., half:], x[..., :half]], -1)
      return x * angles.cos() + turned * angles.sin()

    x = self.transformer.wte(input_ids)
    for block in self.transformer.h.children():
      fused = block.attn.c_attn(norm(block.ln_1, x))
      q, k, v = (
        y.unflatten(-1, (decoder.heads, -1)).transpose(1, 2)
        for y in fused.chunk(3, -1)
      )
      y = torch.nn.functional.scaled_dot_product_attention(
        turn(q), turn(k), v, is_causal=True
      )
      x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
      y = norm(block.ln_2, x)
      gate = torch.nn.functional.silu(block.mlp.w2(y))
      x = x + block.mlp.c_proj(block.mlp.w1(y) * gate)
    return self.lm_head(norm(self.transformer.ln_f, x))


def load(folder):
  return {
    name: torch.from_numpy(tensor.load().astype(np.float32))
    for name, tensor in open_released(folder).items()
  }


@pytest.fixture(scope='module')
def released():
  tensors = open_released(golden.FOLDER).items()
  return Released(
    {
      name: torch.from_numpy(tensor.load().astype(np.float32))
      for name, tensor in tensors
    }
  )


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """An adapter of ours with every target, and the table and head whole."""
  folder = tmp_path_factory.mktemp('ours')
  lora = LoraConfig(rank=3, alpha=5, targets='.*', rslora=True)
  rng = np.random.default_rng(0)
  shapes = low_rank.factor_shapes(golden.config().replace(lora=lora))
  values = {path: rng.normal(0, 0.1, shape) for path, shape in shapes.items()}
  decoder = golden.params()['decoder']
  values['decoder/embed'] = np.multiply(decoder['embed'], 1.25)
  values['decoder/lm_head/kernel'] = np.multiply(
    decoder['lm_head']['kernel'], 1.5
  )
  values = {path: np.float32(x) for path, x in values.items()}
  base = adapters.base_of(golden.FOLDER)
  adapter = low_rank.LowRank(lora, base, values, str(folder))
  low_rank.write_ours(folder, adapter)
  assets.write_assets(folder, golden.config())
  return folder


@pytest.fixture
def loaded(released, ours, tmp_path):
  """(folder in PEFT's layout, what PEFT makes of it)."""
  folder = tmp_path / 'peft'
  adapters.to_peft(ours, folder)
  model = copy.deepcopy(released)
  with warnings.catch_warnings():
    # PEFT warns of names that it misses, and of those that it does not know.
    warnings.simplefilter('error')
    return folder, peft.PeftModel.from_pretrained(model, str(folder)).eval()


def logits_of(model):
  ids = golden.expected()['eval/text/ids']
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(np.int64(ids))).numpy()


def our_logits(**adapter):
  model = qwenvl_jax.load(golden.FOLDER, dtype='float32', **adapter)
  return model.logits(golden.expected()['eval/text/ids'])


def test_the_stand_in_computes_what_the_release_does(released):
  found = logits_of(released)[:, -64:]
  wanted = golden.expected()['eval/text/logits_last64']
  np.testing.assert_allclose(found, wanted, atol=golden.ATOL)


def test_ours_in_peft(loaded, ours):
  folder, model = loaded
  found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
  wanted = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
  assert found.keys() == wanted.keys()
  for name, values in wanted.items():
    np.testing.assert_array_equal(found[name], values, err_msg=name)
  np.testing.assert_allclose(
    logits_of(model), our_logits(adapter=ours), atol=golden.ATOL
  )


def test_merged_in_peft(loaded, ours, tmp_path):
  """Each tensor, vision's too, is what we merge, within float32's rounding."""
  _, model = loaded
  merged = model.merge_and_unload().state_dict()
  adapters.merge(golden.FOLDER, ours, tmp_path / 'merged', 'float32')
  to_hf(tmp_path / 'merged', tmp_path / 'released')
  wanted = open_released(tmp_path / 'released')
  assert merged.keys() == wanted.keys()
  for name, tensor in wanted.items():
    np.testing.assert_allclose(
      merged[name], tensor.load(), rtol=1e-6, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize('whole', [None, ['wte', 'lm_head']])
@pytest.mark.parametrize('safe', [True, False])
def test_peft_in_ours(safe, whole, released, tmp_path):
  settings = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=['c_attn', 'attn.c_proj', 'w1', 'w2', 'in_proj'],
    modules_to_save=whole,
    init_lora_weights=False,
    task_type='CAUSAL_LM',
  )
  torch.manual_seed(0)
  model = peft.get_peft_model(copy.deepcopy(released), settings).eval()
  model.save_pretrained(
    tmp_path / 'peft', safe_serialization=safe, save_embedding_layers=False
  )
  assert (tmp_path / 'peft' / 'adapter_model.bin').exists() != safe
  adapters.from_peft(tmp_path / 'peft', golden.FOLDER, tmp_path / 'ours')
  np.testing.assert_allclose(
    our_logits(adapter=tmp_path / 'ours'), logits_of(model), atol=golden.ATOL
  )
