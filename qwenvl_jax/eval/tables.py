"""Scores of a run beside the paper's, as Markdown and as a page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qwenvl_jax.data import html_page

_HEAD = ('benchmark', 'metric', 'score', '95% interval', 'n', 'problems')

_STYLE = """
.more { max-width: 60rem; } pre { white-space: pre-wrap; background: #f4f6f9;
padding: .6rem; } .short { color: #b3261e; }
"""


def rows(
  summaries: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Head and rows of the table: a row a metric, a task's own metric first."""
  models = dict.fromkeys(x for summary in summaries for x in summary['paper'])
  head = (*_HEAD, *(f'paper: {name}' for name in models))
  found = []
  for summary in summaries:
    names = sorted(summary['scores'], key=lambda x: x != summary['metric'])
    for name in names:
      found.append(_row(summary, name, tuple(models)))
    if not names:
      found.append(
        (summary['title'], '', 'no score', '', '0', _bad(summary))
        + ('',) * len(models)
      )
  return head, found


def _row(summary, name: str, models: Sequence[str]) -> tuple[str, ...]:
  scale, score = summary['scale'], summary['scores'][name]
  low, high = score['interval']
  paper = [summary['paper'].get(x, {}).get(name) for x in models]
  return (
    summary['title'],
    name,
    f'{score["score"] * scale:.2f}',
    f'{low * scale:.2f} to {high * scale:.2f}',
    str(score['count']),
    _bad(summary),
    *('' if x is None else f'{x:g}' for x in paper),
  )


def _bad(summary) -> str:
  counts = summary['counts']
  problems = [f'{n} {why}' for why, n in counts['problems'].items()]
  if counts['answered'] and not summary['scores']:
    files = ', '.join(summary.get('submissions', ()))
    problems.append(f'true answers are not public: submit {files}')
  if counts['not_asked_yet']:
    problems.append(f'{counts["not_asked_yet"]} not asked yet')
  return ', '.join(problems)


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
  """The table in Markdown, and below it how each figure came about."""
  head, found = rows(summaries)

  def line(cells):
    # What would end a cell or a row.
    cells = (' '.join(x.split()).replace('|', '\\|') for x in cells)
    return f'| {" | ".join(cells)} |'

  parts = [line(head), line(['---'] * len(head)), *map(line, found)]
  for summary in summaries:
    parts += ['', f'### {summary["title"]} (`{summary["task"]}`)', '']
    for name, value in _about(summary):
      parts.append(f'- {name}: {" ".join(value.split())}')
  return '\n'.join(parts) + '\n'


def page(summaries: Sequence[Mapping[str, Any]], facts: Mapping[str, str]):
  """The same as a page; `facts` are said first, name to value."""
  head, found = rows(summaries)
  parts = [
    html_page.table((), ([escape(k), escape(v)] for k, v in facts.items())),
    '<h2>Scores</h2>',
    html_page.table(
      map(escape, head), ([escape(cell) for cell in row] for row in found)
    ),
    '<p><a href="pictures.html">Pictures with questions and answers</a></p>',
  ]
  for summary in summaries:
    parts.append(f'<h2>{escape(summary["title"])}</h2>')
    parts += [
      f'<p class="more"><b>{escape(name)}</b>: {escape(value)}</p>'
      for name, value in _about(summary)
    ]
    parts.append(_categories(summary))
    if summary['problems']:
      lines = ''.join(
        f'<li>{escape(message)}</li>'
        for message in summary['problems'].values()
      )
      parts.append(f'<div class="short">Without answer:<ul>{lines}</ul></div>')
  return html_page.page('Evaluation', ''.join(parts), _STYLE)


def _about(summary) -> list[tuple[str, str]]:
  prompt = summary['prompt']
  style = 'a chat' if prompt['chat'] else 'as it is'
  decoding = ', '.join(
    f'{name} {value}' for name, value in summary['decoding'].items() if value
  )
  if not summary['decoding']['temperature']:
    decoding += ', greedy'
  if prompt['choices']:
    decoding = 'the likeliest choice, by the mean cross entropy of its tokens'
  template = prompt['template'] or prompt['first'][:500]
  return [
    ('prompt', f'{template!r}, {style}'),
    ('decoding', decoding),
    ('post-processing', summary['postprocessing'] or 'none'),
  ]


def _categories(summary) -> str:
  found = summary['categories']
  if len(found) < 2:
    return ''
  names = list(dict.fromkeys(x for row in found.values() for x in row))
  rows = (
    [escape(name)]
    + [
      '' if x not in row else _cell(x, row[x], summary['scale']) for x in names
    ]
    for name, row in found.items()
  )
  return html_page.table(['', *map(escape, names)], rows)


def _cell(name: str, value: float, scale: float) -> str:
  return str(value) if name == 'count' else f'{value * scale:.2f}'
