"""What cleaning did, as a page for people and as figures for programs."""

import collections
import html
import json

from qwenvl_jax.data.cleaning.shards import Job
from qwenvl_jax.data.cleaning.tally import KEPT, Example, Tally

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #d8dde6;
         text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
tr.kept { background: #eaf6ec; font-weight: 600; }
tr.total { border-top: 2px solid #1c2330; }
small { color: #667; }
.bar { display: inline-block; height: .7em; background: #7a9fd4; }
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

# Reasons that no rule of the configuration has.
_READING = {
  'damaged_shard': 'the file ends or breaks off there; what follows is lost',
  'no_image': 'the record has no picture',
  'no_text': 'the record has no text',
  'text_encoding': 'the text is not UTF-8',
  'too_large': 'the picture file is too large to be one',
  'unreadable_image': 'the picture does not decode',
}


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
  sources = {}
  for source in dict.fromkeys(shard.source.name for shard in job.shards):
    outcomes = {r: n for (s, r), n in tally.outcomes.items() if s == source}
    sources[source] = {
      'records': sum(outcomes.values()),
      'kept': outcomes.get(KEPT, 0),
      'dropped': {r: outcomes.get(r, 0) for r in reasons(job, tally)},
      'changed': {r: n for (s, r), n in tally.changed.items() if s == source},
    }
  return json.dumps(sources, indent=2) + '\n'


def page(job: Job, tally: Tally) -> str:
  """One HTML file without external parts."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<title>Cleaning</title><style>{_STYLE}</style><h1>Cleaning</h1>'
    '<p>Every record is counted once: where it is kept, or at the first rule '
    'that drops it. Rules stand in the order in which they are applied.</p>'
    + _outcomes(job, tally)
    + _changed(tally)
    + _examples('Dropped', tally.dropped, reasons(job, tally))
    + _examples('Changed', tally.altered, [n for _, n in tally.changed])
    + _examples('Kept', tally.dropped, [KEPT])
    + _settings(job)
    + '</html>\n'
  )


def _outcomes(job, tally):
  sources = list(dict.fromkeys(shard.source.name for shard in job.shards))
  totals = collections.Counter()
  for (source, _), count in tally.outcomes.items():
    totals[source] += count
  everything = sum(totals.values())
  head = ''.join(f'<th>{html.escape(x)}</th>' for x in sources)
  rows = [f'<tr><th></th>{head}<th>all</th><th>share</th><th></th></tr>']

  def row(name, title, kind=''):
    counts = [tally.outcomes[source, name] for source in sources]
    cells = ''.join(f'<td>{n:,}</td>' for n in counts)
    share = sum(counts) / max(everything, 1)
    return (
      f'<tr class="{kind}"><td>{title}</td>{cells}<td>{sum(counts):,}</td>'
      f'<td>{share:.2%}</td><td style="text-align:left">'
      f'<span class="bar" style="width:{12 * share:.2f}em"></span></td></tr>'
    )

  for reason in reasons(job, tally):
    note = f' <small>{_READING[reason]}</small>' if reason in _READING else ''
    rows.append(row(reason, html.escape(reason) + note))
  rows.append(row(KEPT, 'kept', 'kept'))
  cells = ''.join(f'<td>{totals[source]:,}</td>' for source in sources)
  rows.append(
    f'<tr class="total"><td>records</td>{cells}<td>{everything:,}</td></tr>'
  )
  return f'<table>{"".join(rows)}</table>'


def _changed(tally):
  if not tally.changed:
    return ''
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td><td>{html.escape(source)}</td>'
    f'<td>{count:,}</td></tr>'
    for (source, name), count in sorted(tally.changed.items())
  )
  return (
    '<h2>Texts that rules changed</h2><table><tr><th>rule</th><th>source</th>'
    f'<th>texts</th></tr>{rows}</table>'
  )


def _examples(title, examples, names):
  parts = []
  for name in dict.fromkeys(names):
    cards = [_card(x) for x in examples if x.reason == name]
    if cards:
      heading = f'<h3>{html.escape(name)}</h3>' if name != KEPT else ''
      parts.append(f'{heading}<div class="cards">{"".join(cards)}</div>')
  return f'<h2>{title}: examples</h2>{"".join(parts)}' if parts else ''


def _card(example: Example) -> str:
  picture = '<div class="none">no picture</div>'
  if example.thumbnail:
    data = html.escape(example.thumbnail, quote=True)
    picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
  lines = []
  if example.detail:
    lines.append(f'<span class="detail">{html.escape(example.detail)}</span>')
  if example.before:
    lines.append(f'<del>{html.escape(example.before)}</del>')
  lines.append(html.escape(example.text))
  lines.append(
    f'<small>{html.escape(example.source)}: {html.escape(example.id)}</small>'
  )
  return f'<div class="card">{picture}<div>{"<br>".join(lines)}</div></div>'


def _settings(job):
  lines = [job.fingerprints, *job.rules, *job.unique]
  items = ''.join(f'<li><code>{html.escape(repr(x))}</code>' for x in lines)
  return (
    f'<h2>Settings</h2><p>{len(job.shards):,} shards.</p>'
    f'<ul class="settings">{items}</ul>'
  )
