"""The obvious PyTorch pipeline, to compare with: run by data_throughput.py.

torch DataLoader, torchvision's Resize, ToTensor and Normalize, and text to ids
as the released tokenizer does it: `tiktoken` parses every special token, then a
list of ids is walked for `<img>` .. `</img>`, whose path becomes its bytes and
padding. Rows are packed first fit in the order of the samples. It knows nothing
of qwenvl_jax, so that it runs where torch is installed and jax is not.
"""

import base64
import io
import json
import os
import pathlib
import pickle
import sys
import time
import unicodedata

import numpy as np
import tiktoken
import torch
import torchvision
from PIL import Image

PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Tokenizer:
  """Ids as the released tokenizer makes them."""

  def __init__(self, vocabulary: str, image_tokens: int):
    lines = pathlib.Path(vocabulary).read_bytes().splitlines()
    ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, lines)}
    special = (
      ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
      + [f'<|extra_{i}|>' for i in range(205)]
      + ['<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>']
      + ['<img>', '</img>', '<imgpad>']
    )
    self.special = {x: len(ranks) + i for i, x in enumerate(special)}
    self.encoding = tiktoken.Encoding(
      'qwen',
      pat_str=PATTERN,
      mergeable_ranks=ranks,
      special_tokens=self.special,
    )
    self.image_tokens = image_tokens

  def __call__(self, text: str) -> list[int]:
    text = unicodedata.normalize('NFC', text)
    ids = self.encoding.encode(
      text, allowed_special='all', disallowed_special=()
    )
    start, end = self.special['<img>'], self.special['</img>']
    found, at = [], 0
    while at < len(ids):
      found.append(ids[at])
      at += 1
      if found[-1] == start:
        close = ids.index(end, at)
        path = b''.join(
          self.encoding.decode_single_token_bytes(x) for x in ids[at:close]
        )
        padding = [self.special['<imgpad>']] * (self.image_tokens - len(path))
        found += [*path, *padding, end]
        at = close + 1
    return found


class Samples(torch.utils.data.Dataset):
  """Encoded pictures and texts -> float pixels, ids, labels."""

  def __init__(self, samples, tokenizer, size):
    self.samples = samples
    self.tokenizer = tokenizer
    self.transform = torchvision.transforms.Compose(
      [
        torchvision.transforms.Resize(
          (size, size), torchvision.transforms.InterpolationMode.BICUBIC
        ),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(MEAN, STD),
      ]
    )

  def __len__(self):
    return len(self.samples)

  def __getitem__(self, index):
    pictures, prompt, answer = self.samples[index]
    pixels = [
      self.transform(Image.open(io.BytesIO(x)).convert('RGB')) for x in pictures
    ]
    before, after = self.tokenizer(prompt), self.tokenizer(answer)
    ids = torch.tensor(before + after)
    labels = torch.tensor([-100] * len(before) + after)
    return pixels, ids, labels


def packed(batch, length, slots, pad):
  """Rows of the samples of a batch, first fit."""
  rows = []
  for pixels, ids, labels in batch:
    for row in rows:
      if row[1] + len(ids) <= length and row[2] + len(pixels) <= slots:
        break
    else:
      row = [[], 0, 0]
      rows.append(row)
    row[0].append((pixels, ids[:length], labels[:length]))
    row[1] += len(ids)
    row[2] += len(pixels)
  tokens = torch.full((len(rows), length), pad)
  labels = torch.full((len(rows), length), -100)
  segments = torch.zeros((len(rows), length), dtype=torch.int32)
  positions = torch.zeros((len(rows), length), dtype=torch.int32)
  images = []
  for number, (members, _, _) in enumerate(rows):
    at = 0
    for segment, (pixels, ids, wanted) in enumerate(members, start=1):
      end = at + len(ids)
      tokens[number, at:end] = ids
      labels[number, at:end] = wanted
      segments[number, at:end] = segment
      positions[number, at:end] = torch.arange(len(ids))
      images += pixels
      at = end
  pixels = torch.stack(images) if images else torch.zeros(0)
  return tokens, labels, segments, positions, pixels


def main() -> None:
  """Measures what the file of settings says; prints JSON."""
  torch.set_num_threads(1)
  with open(sys.argv[1], 'rb') as file:
    settings = pickle.load(file)
  size = settings['image_size']
  tokenizer = Tokenizer(settings['vocabulary'], settings['image_tokens'])
  samples = Samples(settings['samples'], tokenizer, size)
  loader = torch.utils.data.DataLoader(
    samples,
    batch_size=settings['batch'],
    num_workers=0,
    collate_fn=lambda batch: packed(
      batch,
      settings['sequence_length'],
      settings['image_slots'],
      tokenizer.special['<|endoftext|>'],
    ),
  )
  for index in range(8):  # What is set up on first use.
    samples[index]
  images = tokens = 0
  began, cpu = time.perf_counter(), time.process_time()
  for batch in loader:
    images += len(batch[4])
    tokens += int((batch[2] > 0).sum())
  found = {
    'seconds': time.perf_counter() - began,
    'cpu': time.process_time() - cpu,
    'images': images,
    'tokens': tokens,
  }
  if settings.get('check'):
    mean, std = np.array(MEAN), np.array(STD)
    some = [samples[i] for i in range(settings['check'])]
    np.savez(
      settings['out'],
      **{f'ids{i}': x[1].numpy() for i, x in enumerate(some)},
      **{
        f'pixels{i}': (x[0][0].numpy().transpose(1, 2, 0) * std + mean)
        for i, x in enumerate(some)
        if x[0]
      },
    )
  found['versions'] = [torch.__version__, torchvision.__version__]
  print(json.dumps(found))
  sys.stdout.flush()
  os._exit(0)


if __name__ == '__main__':
  main()
