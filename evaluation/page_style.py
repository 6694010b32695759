"""The look that all our static pages share: one base document with its style inside, readable in light and dark."""

from functools import cache

from jinja2 import DictLoader, Environment, StrictUndefined


@cache
def environment() -> Environment:
    """A jinja environment that escapes everything, knows `base`, and raises on a name that is not given."""
    loader = DictLoader({"base": _BASE})
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


_BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e3e7ee; --paper: #fff; --page: #f5f6f9;
  --good: #16794a; --info: #2563b0; --warning: #a15c00; --critical: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --line: #2b3342; --paper: #171c26;
  --page: #10141b; --good: #56c98e; --info: #7db3f5; --warning: #e9a94a; --critical: #f2867e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; margin: 0; display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; } h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .35rem; }
p { margin: .35rem 0; } a { color: var(--info); }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; margin: 0 0 .25rem; }
.facts { list-style: none; padding: 0; margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .5rem 2rem;
  color: var(--soft); }
.facts b { color: var(--ink); font-size: 1.25rem; margin-right: .25rem; font-variant-numeric: tabular-nums; }
.badge { font-size: .78rem; font-weight: 600; padding: .15rem .6rem; border-radius: 99px;
  border: 1px solid currentColor; }
.badge.passed, .badge.info { color: var(--good); } .badge.info { color: var(--info); }
.badge.warning { color: var(--warning); } .badge.critical { color: var(--critical); }
.card { background: var(--paper); border: 1px solid var(--line); border-left: 4px solid var(--soft); border-radius: 8px;
  padding: .9rem 1.1rem; margin: .7rem 0; }
.card.critical { border-left-color: var(--critical); } .card.warning { border-left-color: var(--warning); }
.card.info { border-left-color: var(--info); }
table { width: 100%; border-collapse: collapse; background: var(--paper); border: 1px solid var(--line);
  font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .5rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.rule { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; } .ids code { margin-right: .4rem; }
img { max-width: 100%; border-radius: 8px; border: 1px solid var(--line); }
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""
