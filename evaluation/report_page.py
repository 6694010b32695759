"""A report as a page and as Markdown: metrics with intervals, what is absent and why, protocol, contact sheet."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.page_style import environment
from evaluation.report import Report


def markdown(report: Report, gate: Sequence[str], contact_sheet: Path | None) -> str:
    """The report as Markdown, the contact sheet linked by file name; `gate` are the lines of a decision."""
    return environment().from_string(_MARKDOWN).render(**_content(report, gate), sheet=contact_sheet)


def page(report: Report, gate: Sequence[str], contact_sheet: Path | None) -> str:
    """The report as one HTML document that loads nothing; the contact sheet is inside it."""
    data = base64.b64encode(contact_sheet.read_bytes()).decode() if contact_sheet else ""
    return environment().from_string(_HTML).render(**_content(report, gate), sheet=data)


def _content(report: Report, gate: Sequence[str]) -> dict[str, object]:
    ends = {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in report.intervals().items()}
    rows = [(name, f"{value:.4f}", ends.get(name, "")) for name, value in sorted(report.metrics.items())]
    return {"report": report, "rows": rows, "protocol": asdict(report.protocol), "gate": gate}


_MARKDOWN = """{% autoescape false %}
# Report {{ report.id }}

Recipe `{{ report.protocol.recipe }}`, checkpoint `{{ report.checkpoint }}`.

| metric | value | 95 % interval over prompts |
|---|---:|---|
{% for name, value, ends in rows %}
| {{ name }} | {{ value }} | {{ ends }} |
{% endfor %}

## Gate

{% for line in gate %}
- {{ line }}
{% endfor %}

## Absent

{% for name, reason in report.absent|dictsort %}
- **{{ name }}**: {{ reason }}
{% endfor %}

## Protocol

{% for name, value in protocol.items() %}
- {{ name }}: {{ value }}
{% endfor %}
{% for note in report.notes %}

> {{ note }}
{% endfor %}
{% if sheet %}

![Samples]({{ sheet.name }})
{% endif %}
{% endautoescape %}
"""

_HTML = """{% extends "base" %}
{% block title %}Report {{ report.id }} · {{ report.protocol.recipe }}{% endblock %}
{% block body %}
<header>
  <p class="eyebrow">{{ report.protocol.recipe }} · report</p>
  <h1><code>{{ report.id }}</code></h1>
  <ul class="facts">
    <li><b>{{ rows|length }}</b> metrics</li>
    <li><b>{{ report.absent|length }}</b> absent</li>
    <li>checkpoint <code>{{ report.checkpoint }}</code></li>
  </ul>
</header>
{% if sheet %}<p><img alt="Frames of every sample" src="data:image/png;base64,{{ sheet }}"></p>{% endif %}
<h2>Metrics</h2>
<table>
  <thead><tr><th>metric</th><th class="number">value</th><th class="number">95 % interval over prompts</th></tr></thead>
  <tbody>
  {% for name, value, ends in rows %}
  <tr><td>{{ name }}</td><td class="number">{{ value }}</td><td class="number">{{ ends }}</td></tr>
  {% endfor %}
  </tbody>
</table>
<h2>Gate</h2>
{% for line in gate %}
<section class="card {{ "critical" if line.startswith("FAIL") else "" }}"><code>{{ line }}</code></section>
{% endfor %}
<h2>Absent, and why</h2>
<table><tbody>
{% for name, reason in report.absent|dictsort %}
<tr><td>{{ name }}</td><td class="rule">{{ reason }}</td></tr>
{% endfor %}
</tbody></table>
<h2>Protocol</h2>
<table><tbody>
{% for name, value in protocol.items() %}
<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>
{% endfor %}
</tbody></table>
{% for note in report.notes %}<p class="rule">{{ note }}</p>{% endfor %}
{% endblock %}
"""
