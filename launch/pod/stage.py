"""The command that every process of a stage runs."""

from __future__ import annotations

import os
import re

from pod.log import PodError, UsageError, read_file, say
from pod.serve import serve_command
from pod.settings import ROOT, Settings

# Programs that one process runs, on one machine.
ONE_HOST = ('eval', 'serve')


def stage_command(s: Settings, stage: str) -> list[str]:
  """The words of a stage's command.

  --workdir holds the runs of all stages: a stage starts from its predecessor's
  run beside its own, or --init.

  Args:
    s: the settings.
    stage: stage1, stage2, stage3, eval or serve.
  """
  if stage in ONE_HOST:
    _check_one_host(s, stage)
  if stage == 'serve':
    return serve_command(s)
  if not s.workdir:
    raise UsageError(
      '--workdir is missing: the folder of the runs, e.g. gs://bucket/qwen-vl'
    )
  runs = s.workdir.rstrip('/') or '/'
  if stage == 'eval':
    setup = read_file(os.path.join(ROOT, 'setup.cfg'))
    if not re.search(r'^ *qwenvl-eval *=', setup, re.MULTILINE):
      raise PodError(
        'this checkout has no command qwenvl-eval yet, which eval would run'
      )
    checkpoint = s.init or f'{runs}/stage3'
    return [
      'qwenvl-eval',
      f'--checkpoint={checkpoint}',
      f'--out={runs}/eval',
      *([f'--data_dir={_data(s)}'] if s.data else []),
    ]
  topology = _topology(s, stage)
  command = [
    'qwenvl-train',
    f'--gin_file={s.config or f"configs/{stage}.gin"}',
    *([f'--gin_file={topology}'] if topology else []),
    f'--workdir={runs}/{stage}',
  ]
  if stage != 'stage1':
    before = {'stage2': 'stage1', 'stage3': 'stage2'}[stage]
    command.append(f'--gin.INIT={_gin_string(s.init or f"{runs}/{before}")}')
  elif s.init:
    start = _gin_string(s.init)
    command += [f'--gin.VISION={start}', f'--gin.DECODER={start}']
  elif not s.config and not any(x.startswith('--gin.') for x in s.extra):
    raise UsageError(
      'stage1 needs --init DIR, made by: qwenvl-convert init-stage1'
    )
  if s.data:
    command.append(f'--gin.DATA={_gin_string(_data(s))}')
  return command


def _data(s: Settings) -> str:
  if s.mount_data and s.data.startswith('gs://'):
    return 'mount://' + s.data[5:]  # worker.py makes a folder of it.
  return s.data


def _check_one_host(s: Settings, name: str) -> None:
  if s.local is not None:
    if s.local != 1:
      raise UsageError(f'{name} is one process: --local 1')
    return
  # A machine has up to 8 chips of v5e and v6e, and 4 of the others.
  most = 8 if (s.type or 'v6e').startswith(('v5litepod', 'v6e')) else 4
  if s.chips > most:
    raise UsageError(
      f'{name} runs on one machine, which has up to {most} chips of this kind; '
      f'--type {s.type} has {s.chips}'
    )


def _topology(s: Settings, stage: str) -> str | None:
  """The config of how a stage uses this kind of pod, if there is one.

  For the stage's config, or for all.
  """
  if s.topology:
    return None if s.topology == 'none' else s.topology
  # Processes of --local are no pod.
  if s.local or not s.type:
    return None
  # v5litepod-256 -> v5e_256: generation and chips.
  generation = s.type.split('-')[0].replace('v5litepod', 'v5e')
  folder = f'configs/topology/{generation}_{s.chips}'
  config = os.path.basename(s.config or stage)
  config = config[:-4] if config.endswith('.gin') else config
  for file in (f'{folder}/{config}.gin', f'{folder}/mesh.gin'):
    if os.path.isfile(os.path.join(ROOT, file)):
      return file
  say(f'there is no {folder}: the mesh is that of configs/train.gin')
  return None


def _gin_string(text: str) -> str:
  """A path as a Python string."""
  return '"' + text.replace('\\', '\\\\').replace('"', '\\"') + '"'
