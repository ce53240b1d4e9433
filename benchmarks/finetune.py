"""Fine-tunes a quickstart's model on 100 made pictures: before and after.

Half of the pictures show one thing that the model has never seen, the others
things that it knows; all are asked for in a new way and answered in a new
style. By LoRA, Q-LoRA and fully; alone, and with old conversations mixed in:

  source launch/env.sh
  bash launch/quickstart.sh
  python benchmarks/finetune.py runs/quickstart --folder SCRATCH

Prints, as Markdown, the share of right answers on other pictures (the new
style, the new thing, known ones, the background) and what remains of old skills
on held-out scenes. Steps that are done are not repeated.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from safetensors.numpy import load_file, save_file

from qwenvl_jax import api
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.task import Example, Item, Picture, Prompt
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.quickstart import own_pictures

MIXED = "MIX={'known': 1.0}"
OLD_SKILLS = (*scenes.WITH_FLOOR, 'name_box', 'side')


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to fine-tune.

  Attributes:
    config: of `configs/finetune/`.
    settings: bindings. The release's are for 9.6 billion parameters.
    packed: whether the model's kernels are held at 4 bits.
  """

  config: str
  settings: Sequence[str]
  packed: bool = False

  @property
  def mixed(self) -> bool:
    return MIXED in self.settings


_LORA = ('RANK=16', 'ALPHA=32.0', 'OptimizerConfig.peak=2e-3')
_FULL = ('OptimizerConfig.peak=1e-3',)
_QLORA = (*_LORA, 'DecoderConfig.int4_group=8', 'TrainConfig.accumulation=1')
METHODS = {
  'LoRA': Method('lora', (*_LORA, MIXED)),
  'LoRA, not mixed': Method('lora', _LORA),
  'full': Method('full', (*_FULL, MIXED)),
  'Q-LoRA': Method('qlora', (*_QLORA, MIXED), packed=True),
}


def run(module: str, *arguments: str) -> None:
  subprocess.run([sys.executable, '-m', module, *arguments], check=True)


def claim(args: argparse.Namespace) -> None:
  """Ends the program if the folder holds what other arguments made."""
  args.folder.mkdir(parents=True, exist_ok=True)
  file, made_with = args.folder / 'arguments.json', str(vars(args))
  if file.exists() and json.loads(file.read_text()) != made_with:
    raise SystemExit(
      f'{args.folder} was made with other arguments: name another --folder'
    )
  file.write_text(json.dumps(made_with))


def prepare(folder: pathlib.Path, quickstart: pathlib.Path, count: int) -> None:
  """Writes and prepares the pictures and the old conversations."""
  if not (folder / 'pictures').exists():
    own_pictures.write(folder / 'pictures', count)
  if not (folder / 'known').exists():
    own_pictures.write_known(folder / 'known', quickstart / 'data')
  for name, form, place in (
    ('mine', 'csv', 'pictures'),
    ('known', 'conversations', 'known'),
  ):
    run(
      'qwenvl_jax.data.cli', 'prepare', name, '--format', form,
      '--manual_dir', str(folder / place), '--data_dir', str(folder / 'data'),
    )  # fmt: skip


def pack(base: pathlib.Path, out: pathlib.Path, group: int = 8) -> None:
  """Writes a model in the layout of the Int4 release, rounded to nearest.

  Args:
    base: a checkpoint.
    out: folder to write.
    group: inputs that share a scale; the release's 128 do not divide all of the
      quickstart's sizes.
  """
  shutil.rmtree(out, ignore_errors=True)
  run('qwenvl_jax.conversion.cli', 'to-hf', str(base), str(out))
  tensors = {}
  for file in out.glob('*.safetensors'):
    tensors |= load_file(file)
    file.unlink()
  (out / 'model.safetensors.index.json').unlink(missing_ok=True)
  packed = {}
  for name, kernel in tensors.items():
    root, _, kind = name.rpartition('.')
    in_block = '.h.' in name and kind == 'weight' and kernel.ndim == 2
    packed |= _packed(root, kernel, group) if in_block else {name: kernel}
  save_file(packed, out / 'model.safetensors', {'format': 'pt'})
  config = json.loads((out / 'config.json').read_text())
  config['quantization_config'] = {
    'quant_method': 'gptq',
    'bits': 4,
    'group_size': group,
    'desc_act': False,
    'sym': True,
  }
  (out / 'config.json').write_text(json.dumps(config, indent=1))


def _packed(root: str, kernel, group: int) -> dict[str, np.ndarray]:
  """A kernel [out,in] in the layout of `conversion/gptq.py`, symmetric."""
  values = kernel.T.astype(np.float32)
  groups = values.reshape(-1, group, values.shape[1])
  scales = np.maximum(np.abs(groups).max(1) / 7, 1e-8).astype(np.float16)
  scale = np.repeat(scales.astype(np.float32), group, axis=0)
  steps = np.clip(np.rint(values / scale) + 8, 0, 15).astype(np.uint32)
  shifts = np.arange(0, 32, 4, dtype=np.uint32)
  words = steps.reshape(-1, 8, values.shape[1]) << shifts[:, None]
  zeros = np.full((len(groups), values.shape[1] // 8), 0x77777777, np.int32)
  return {
    f'{root}.qweight': words.sum(1, dtype=np.uint32).view(np.int32),
    f'{root}.qzeros': zeros,
    f'{root}.scales': scales,
    f'{root}.g_idx': np.arange(len(values), dtype=np.int32) // np.int32(group),
  }


def train(
  method: Method, base: pathlib.Path, out: pathlib.Path, folder, epochs: float
) -> float:
  """Fine-tunes; returns the minutes it took."""
  done = out / 'minutes.json'
  if done.exists():
    return json.loads(done.read_text())
  bindings = (
    f'BASE="{base}"',
    f'VOCABULARY="{base / "qwen.tiktoken"}"',
    f'DATA="{folder / "data"}"',
    f'EPOCHS={epochs}',
    *(() if method.mixed else ('Pipeline.sequence_length=96',)),
    *method.settings,
  )
  began = time.monotonic()
  run(
    'qwenvl_jax.train.main',
    f'--gin_file=finetune/{method.config}.gin',
    '--gin_file=finetune/quickstart.gin',
    f'--workdir={out}',
    *(f'--gin.{binding}' for binding in bindings),
  )
  minutes = (time.monotonic() - began) / 60
  done.write_text(json.dumps(minutes))
  return minutes


def new_pictures(count: int) -> Iterator[Example]:
  """Questions about pictures like those that were trained on."""
  rng = random.Random('held out')
  for number in range(count):
    drawn = own_pictures.draw(rng, new=number % 2 == 0)
    picture = Picture(functools.partial(getattr, drawn, 'image'), 'drawn')
    yield Example(
      f'new/{number}',
      Prompt((picture, own_pictures.QUESTION), chat=True),
      target=own_pictures.truth(drawn),
      category='the new thing' if number % 2 == 0 else 'known things',
    )


def judge(example: Example, text: str) -> Iterator[tuple[str, bool]]:
  """What an answer counts for: rows of the table."""
  if example.meta:
    item = Item(example, text)
    question = scenes.question_of(item)
    right = scenes.judge(question, text).correct
    yield f'old skill: {question.kind}', right
    return
  (colour, thing), said = example.target, text.split(' / ')
  yield 'new style', len(said) == 2
  yield f'{example.category}, in the new style', said[-1] == thing
  yield 'the background, in the new style', said[0] == colour


def score(
  folder: pathlib.Path, examples: Iterable[Example]
) -> dict[str, float]:
  """Shares of right answers by row."""
  handle = api.load(folder)
  sizes = EngineConfig(slots=64, max_len=256, read_rows=8)
  model = EngineModel(handle.engine(sizes), handle.tokenizer, {})
  decoding = registry.get('scenes_chat').decoding
  replies = {x.key: r.text for x, r in model.answer(examples, decoding)}
  found = collections.defaultdict(list)
  for example in examples:
    for row, right in judge(example, replies[example.key]):
      found[row].append(right)
  return {row: float(np.mean(right)) for row, right in found.items()}


def size(folder: pathlib.Path) -> int:
  return sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())


def column(
  name: str, args: argparse.Namespace, examples: Sequence[Example]
) -> dict[str, str]:
  """Trains if there is something to train, scores, and says what came out."""
  base, method = args.quickstart / 'stage3', METHODS.get(name)
  folder, facts = base, {}
  if method is not None:
    if method.packed:
      base = args.folder / 'int4'
      if not (base / 'packed').exists():
        pack(args.quickstart / 'stage3', base)
        (base / 'packed').touch()
    out = args.folder / re.sub(r'\W+', '_', name)
    minutes = train(method, base, out, args.folder, args.epochs)
    folder = out / 'best'
    log = map(json.loads, (out / 'log.jsonl').read_text().splitlines())
    best = min(
      (x for x in log if 'heldout_loss' in x), key=lambda x: x['heldout_loss']
    )
    facts = {
      'lowest held-out loss': f'{best["heldout_loss"]:.3f}',
      'of step': str(best['step']),
      'saved, MB': f'{size(folder) / 1e6:.1f}',
      'training, minutes': f'{minutes:.1f}',
    }
  file = args.folder / 'scores' / f'{name}.json'
  if not file.exists():
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(score(folder, examples), indent=1))
  scores = json.loads(file.read_text())
  return {row: f'{share:.2f}' for row, share in scores.items()} | facts


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('quickstart', type=pathlib.Path, help='its folder')
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--pictures', type=int, default=100)
  parser.add_argument('--epochs', type=float, default=8.0)
  parser.add_argument('--asked', type=int, default=40, help='of new skills')
  parser.add_argument('--scenes', type=int, default=20, help='of old skills')
  args = parser.parse_args()
  args.folder = args.folder.absolute()
  args.quickstart = args.quickstart.absolute()
  claim(args)
  prepare(args.folder, args.quickstart, args.pictures)
  task = dataclasses.replace(
    registry.get('scenes_chat'),
    kinds=OLD_SKILLS,
    scenes=args.scenes,
  )
  old = [x for x in task.examples(args.quickstart / 'data') if x.meta]
  examples = [*new_pictures(args.asked), *old]
  columns = {}
  for name in ('before', *METHODS):
    columns[name] = column(name, args, examples)
    print(name, json.dumps(columns[name]), flush=True)
  print(f'\n| right answers | {" | ".join(columns)} |')
  print('|---' * (1 + len(columns)) + '|')
  for row in dict.fromkeys(row for x in columns.values() for row in x):
    cells = [found.get(row, '') for found in columns.values()]
    print(f'| {row} | {" | ".join(cells)} |')


if __name__ == '__main__':
  main()
