"""The plan as a table for people."""

from collections.abc import Iterator, Sequence

from rich import filesize
from rich.console import Console
from rich.table import Table

from qwenvl_jax.plan.plan import Plan
from qwenvl_jax.plan.search import Candidate
from qwenvl_jax.plan.topology import GIB


def show(plan: Plan, console: Console) -> None:
  """Prints a plan."""
  axes = ', '.join(f'{axis} {size}' for axis, size in plan.mesh.items())
  table = Table(
    title=f'{plan.what} on {plan.topology}, {plan.chips:,} chips ({axes})',
    show_header=False,
    title_justify='left',
  )
  for side in ('left', 'right', 'left'):
    table.add_column(justify=side)
  for row in _rows(plan):
    table.add_row(*row)
  console.print(table)
  if not plan.fits:
    console.print('It does not fit. What would help, cheapest first:')
    for number, line in enumerate(plan.advice, 1):
      console.print(f'  {number}. {line}', highlight=False)
    return
  if plan.unknown_kernels:
    console.print(
      f'Not counted: {", ".join(plan.unknown_kernels)}', highlight=False
    )
  if plan.estimated_step_seconds is None:
    console.print('Compiled with little effort: no times.')
  else:
    console.print(
      "Times are estimates, from the compiler's cycles and the bandwidth of "
      'the links; nothing ran on a TPU.'
    )


def _rows(plan: Plan) -> Iterator[tuple[str, ...]]:
  """Yields a name, a value and perhaps a remark for each row."""
  yield (
    'parameters',
    f'{plan.parameters / 1e9:.2f} B',
    f'{plan.trained_parameters / 1e9:.2f} B trained; '
    f'{plan.parameters_per_chip / 1e6:.1f} M a chip',
  )
  yield (
    'batch',
    f'{plan.rows:,} rows',
    f'{plan.accumulation} microbatches, {plan.rows_per_chip:g} rows a shard',
  )
  share = plan.peak_hbm_bytes / plan.hbm_limit_bytes
  yield (
    'memory at the peak' if plan.fits else 'memory needed',
    f'{plan.peak_hbm_bytes / GIB:.2f} GiB',
    f'{share:.0%} of {plan.hbm_limit_bytes / GIB:.2f} GiB a chip',
  )
  for kind, size in plan.kept_bytes.items():
    yield (f'  {kind}', f'{size / GIB:.2f} GiB')
  if plan.kept_bytes:
    rest = plan.peak_hbm_bytes - sum(plan.kept_bytes.values())
    yield ('  activations and the rest', f'{rest / GIB:.2f} GiB')
  if not plan.fits:
    return
  yield (
    'state and batch',
    f'{plan.argument_bytes / GIB:.2f} GiB',
    f'{plan.argument_bytes / plan.ideal_argument_bytes:.2f} times the ideal',
  )
  if plan.hbm_read_bytes is not None:
    reading = plan.hbm_read_bytes / plan.hbm_bytes_per_second
    yield (
      'read from memory',
      filesize.decimal(int(plan.hbm_read_bytes)),
      f'a chip and step: parameters and a full cache; {_seconds(reading)} at '
      f'{plan.hbm_bytes_per_second / 1e9:,.0f} GB/s',
    )
  yield (
    'FLOPs of the program',
    _flops(plan.program_flops),
    f'a chip and step; {_flops(plan.kernel_flops)} in attention kernels',
  )
  yield (
    'FLOPs of the model',
    _flops(plan.model_flops),
    f'program / model {plan.flops_ratio:.3f}; causal attention counts half',
  )
  yield (
    'sent between chips',
    filesize.decimal(int(plan.collective_bytes)),
    ''
    if plan.overlapped_share is None
    else f'{plan.overlapped_share:.0%} beside computation',
  )
  for kind, one in plan.collectives.items():
    yield (f'  {kind}', filesize.decimal(int(one['bytes'])), _traffic(one))
  if plan.estimated_step_seconds is None:
    return
  waiting = ''
  if plan.hbm_read_bytes is not None:
    waiting = f'{_seconds(plan.estimated_memory_seconds)} memory + '
  yield (
    'estimated step',
    _seconds(plan.estimated_step_seconds),
    f'{_seconds(plan.estimated_compute_seconds)} computing + '
    f'{_seconds(plan.estimated_kernel_seconds)} attention kernels + {waiting}'
    f'{_seconds(plan.estimated_exposed_seconds)} waiting for collectives',
  )
  if plan.hbm_share is not None:
    yield (
      'share of the bandwidth',
      f'{plan.hbm_share:.0%}',
      f'the step takes {1 / plan.hbm_share:.2f} times what reading does',
    )
  yield ('estimated MFU', f'{plan.estimated_mfu:.1%}', 'of the bfloat16 peak')
  yield (
    'estimated throughput',
    f'{plan.estimated_tokens_per_second:,.0f} tokens/s',
    f'{plan.estimated_images_per_second:,.0f} images/s',
  )
  if plan.steps is not None:
    yield (
      f'estimated for {plan.steps:,} steps',
      f'{plan.estimated_days:,.1f} days',
      f'{plan.estimated_chip_hours:,.0f} chip-hours',
    )


def _traffic(one: dict[str, float]) -> str:
  text = f'{one["count"]:,} times'
  if one['bytes']:
    text += f', {one["overlapped_bytes"] / one["bytes"]:.0%} beside computation'
  if 'exposed_seconds' in one:
    text += f', {_seconds(one["exposed_seconds"])} waited for'
  return text


def _flops(count: float) -> str:
  """A training step has teraFLOPs, one more token gigaFLOPs."""
  return f'{count / 1e12:,.1f} T' if count >= 1e11 else f'{count / 1e9:,.1f} G'


def _seconds(seconds: float) -> str:
  """A training step takes seconds, one more token milliseconds."""
  return f'{seconds:.3f} s' if seconds >= 0.1 else f'{seconds * 1e3:.2f} ms'


def line(candidate: Candidate, plan: Plan | str) -> str:
  """What came of one candidate of a search."""
  if isinstance(plan, str):
    return f'{candidate.text}: {plan}'
  memory = f'{plan.peak_hbm_bytes / GIB:.2f} GiB'
  if not plan.fits:
    return f'{candidate.text}: needs {memory}'
  return (
    f'{candidate.text}: {memory}, estimated '
    f'{plan.estimated_step_seconds:.3f} s, MFU {plan.estimated_mfu:.1%}'
  )


def show_ranking(
  ranked: Sequence[tuple[Candidate, Plan]], tried: int, console: Console
) -> None:
  """Prints what a search found, fastest first, and how to take the first."""
  if not ranked:
    console.print(f'None of the {tried} programs tried fits.')
    return
  table = Table(
    title=f'{ranked[0][1].topology}: {len(ranked)} of {tried} tried fit; times '
    'are estimates',
    title_justify='left',
  )
  for name in (
    'data', 'fsdp', 'tensor', 'accumulation', 'rows a shard', 'remat',
    'vision', 'peak GiB', 'program/model', 'step s', 'MFU',
  ):  # fmt: skip
    table.add_column(name, justify='right')
  for candidate, plan in ranked:
    table.add_row(
      str(candidate.data),
      str(candidate.fsdp),
      str(candidate.tensor),
      str(candidate.accumulation),
      f'{plan.rows_per_chip:g}',
      candidate.remat,
      candidate.vision_remat or 'the same',
      f'{plan.peak_hbm_bytes / GIB:.2f}',
      f'{plan.flops_ratio:.3f}',
      f'{plan.estimated_step_seconds:.3f}',
      f'{plan.estimated_mfu:.1%}',
    )
  console.print(table)
  console.print(
    'The first: ' + ' '.join(ranked[0][0].overrides), soft_wrap=True
  )
