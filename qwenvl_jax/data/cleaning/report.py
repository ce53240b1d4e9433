"""What cleaning did, as a page for people and as figures for programs."""

import base64
import collections
import json
from collections.abc import Iterator
from html import escape

from qwenvl_jax.data import html_page
from qwenvl_jax.data.cleaning.rule_stats import KEPT, Example, RuleStats
from qwenvl_jax.data.cleaning.shards import Job
from qwenvl_jax.data.record_errors import DROPPED

_STYLE = """
tr.kept { background: #eaf6ec; font-weight: 600; }
tr.total { border-top: 2px solid #1c2330; }
td .bar { float: left; height: .7em; background: #7a9fd4; }
.kept .bar { background: #5aa469; }
.cards { display: grid; gap: .8rem;
         grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { display: flex; gap: .7rem; border: 1px solid #d8dde6; padding: .6rem;
        border-radius: .4rem; font-size: .85rem; line-height: 1.35; }
.card img, .card .none { width: 96px; flex: none; align-self: start; }
.card .none { color: #99a; text-align: center; }
.card div { min-width: 0; overflow-wrap: anywhere; }
.detail { color: #b3261e; } del { color: #99a; } .settings { font-size: .8rem; }
"""


def reasons(job: Job, tally: RuleStats) -> list[str]:
  """Why records are dropped, in the order in which they are."""
  rules = [rule.name for rule in (*job.rules, *job.unique)]
  met = sorted({reason for _, reason in tally.outcomes if reason != KEPT})
  reading = [x for x in met if x not in rules]
  # Rules that only change texts drop nothing.
  changing = {name for _, name in tally.changed}
  return reading + [x for x in rules if x in met or x not in changing]


def sources(job: Job) -> list[str]:
  """Names of what is cleaned, in order."""
  return list(dict.fromkeys(shard.source.name for shard in job.shards))


def outcomes(
  job: Job, tally: RuleStats
) -> Iterator[tuple[str, list[int], float]]:
  """Yields each of `reasons` and then KEPT, records by source, their share."""
  found = tally.outcomes
  everything = max(found.total(), 1)
  for reason in (*reasons(job, tally), KEPT):
    counts = [found[source, reason] for source in sources(job)]
    yield reason, counts, sum(counts) / everything


def figures(job: Job, tally: RuleStats) -> str:
  """The counts as JSON: by source, and of dropped and changed by rule."""
  found, changed = {}, tally.changed
  names, counts, _ = zip(*outcomes(job, tally))
  for source, (*dropped, kept) in zip(sources(job), zip(*counts)):
    found[source] = {
      'records': sum(dropped) + kept,
      'kept': kept,
      'dropped': dict(zip(names, dropped)),
      'changed': {r: n for (s, r), n in changed.items() if s == source},
    }
  return json.dumps(found, indent=2) + '\n'


def page(job: Job, tally: RuleStats) -> str:
  """One HTML file without external parts."""
  body = (
    '<p>Every record is counted once: where it is kept, or at the first rule '
    'that drops it. Rules stand in the order in which they are applied.</p>'
    + _outcomes(job, tally)
    + _changed(tally)
    + _examples('Dropped', tally.dropped, reasons(job, tally))
    + _examples('Changed', tally.altered, [n for _, n in tally.changed])
    + _examples('Kept', tally.dropped, [KEPT])
    + _settings(job)
  )
  return html_page.page('Cleaning', body, _STYLE)


def _outcomes(job, tally):
  names, totals = sources(job), collections.Counter()
  rules, rows = {rule.name for rule in job.rules}, []
  for reason, counts, share in outcomes(job, tally):
    title = escape(reason) or 'kept'
    if reason in DROPPED and reason not in rules:
      title += f' <small>{escape(DROPPED[reason])}</small>'
    bar = f'<span class="bar" style="width:{12 * share:.2f}em"></span>'
    cells = [f'{n:,}' for n in (*counts, sum(counts))]
    kind = '' if reason else 'kept'
    rows.append((kind, [title, *cells, f'{share:.2%}', bar]))
    totals.update(dict(zip(names, counts)))
  cells = (*(totals[name] for name in names), totals.total())
  rows.append(('total', ['records', *(f'{n:,}' for n in cells)]))
  return html_page.table(['', *map(escape, names), 'all', 'share', ''], rows)


def _changed(tally):
  if not tally.changed:
    return ''
  rows = (
    [escape(name), escape(source), f'{count:,}']
    for (source, name), count in sorted(tally.changed.items())
  )
  return '<h2>Texts that rules changed</h2>' + html_page.table(
    ['rule', 'source', 'texts'], rows
  )


def _examples(title, examples, names):
  parts = []
  for name in dict.fromkeys(names):
    cards = [_card(x) for x in examples if x.reason == name]
    if cards:
      heading = f'<h3>{escape(name)}</h3>' if name != KEPT else ''
      parts.append(f'{heading}<div class="cards">{"".join(cards)}</div>')
  return f'<h2>{title}: examples</h2>{"".join(parts)}' if parts else ''


def _card(example: Example) -> str:
  picture = '<div class="none">no picture</div>'
  if example.thumbnail:
    data = base64.b64decode(example.thumbnail)
    picture = html_page.picture(data, 'jpeg')
  lines = []
  if example.detail:
    lines.append(f'<span class="detail">{escape(example.detail)}</span>')
  if example.before:
    lines.append(f'<del>{escape(example.before)}</del>')
  lines.append(escape(example.text))
  lines.append(f'<small>{escape(f"{example.source}: {example.id}")}</small>')
  return f'<div class="card">{picture}<div>{"<br>".join(lines)}</div></div>'


def _settings(job):
  lines = [job.fingerprints, *job.rules, *job.unique]
  items = ''.join(f'<li><code>{escape(repr(x))}</code>' for x in lines)
  return (
    f'<h2>Settings</h2><p>{len(job.shards):,} shards.</p>'
    f'<ul class="settings">{items}</ul>'
  )
