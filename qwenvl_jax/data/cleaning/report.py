"""What cleaning did, as a page for people and as figures for programs."""

import base64
import json
from html import escape

from qwenvl_jax.data import html_page
from qwenvl_jax.data.bad import DROPPED
from qwenvl_jax.data.cleaning.shards import Job
from qwenvl_jax.data.cleaning.tally import KEPT, Example, Tally

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


def reasons(job: Job, tally: Tally) -> list[str]:
  """Why records are dropped, in the order in which they are."""
  rules = [rule.name for rule in (*job.rules, *job.unique)]
  met = sorted({reason for _, reason in tally.outcomes if reason != KEPT})
  reading = [x for x in met if x not in rules]
  # Rules that only change texts drop nothing.
  changing = {name for _, name in tally.changed}
  return reading + [x for x in rules if x in met or x not in changing]


def figures(job: Job, tally: Tally) -> str:
  """The counts as JSON: by source, and of dropped and changed by rule."""
  sources, changed = {}, tally.changed
  for source in dict.fromkeys(shard.source.name for shard in job.shards):
    outcomes = {r: n for (s, r), n in tally.outcomes.items() if s == source}
    sources[source] = {
      'records': sum(outcomes.values()),
      'kept': outcomes.get(KEPT, 0),
      'dropped': {r: outcomes.get(r, 0) for r in reasons(job, tally)},
      'changed': {r: n for (s, r), n in changed.items() if s == source},
    }
  return json.dumps(sources, indent=2) + '\n'


def page(job: Job, tally: Tally) -> str:
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
  sources = list(dict.fromkeys(shard.source.name for shard in job.shards))
  totals = [tally.counts.seen_of(source) for source in sources]
  rules = {rule.name for rule in job.rules}

  def row(name, title, kind=''):
    counts = [tally.outcomes[source, name] for source in sources]
    share = sum(counts) / max(sum(totals), 1)
    bar = f'<span class="bar" style="width:{12 * share:.2f}em"></span>'
    cells = (*counts, sum(counts))
    return kind, [title, *(f'{n:,}' for n in cells), f'{share:.2%}', bar]

  rows = []
  for reason in reasons(job, tally):
    is_reading = reason in DROPPED and reason not in rules
    note = f' <small>{escape(DROPPED[reason])}</small>' if is_reading else ''
    rows.append(row(reason, escape(reason) + note))
  rows.append(row(KEPT, 'kept', 'kept'))
  cells = (*totals, sum(totals))
  rows.append(('total', ['records', *(f'{n:,}' for n in cells)]))
  return html_page.table(['', *map(escape, sources), 'all', 'share', ''], rows)


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
