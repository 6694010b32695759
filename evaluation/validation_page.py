"""One static page about one validated table: self-contained HTML, no script, nothing loaded from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.page_style import environment
from evaluation.suites import Severity


@dataclass(frozen=True)
class Line:
    """One expectation on the page, and what was found."""

    passed: bool
    severity: Severity
    column: str
    meaning: str
    rule: str
    count: int
    observed: str
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """Everything the page shows: table, recipe, verdict in words, worst severity (or `passed`), rows, expectations."""

    table: str
    recipe: str
    verdict: str
    level: str
    num_rows: int
    lines: Sequence[Line]


def render(page: Page) -> str:
    """The page as one HTML document; every value from the table is escaped."""
    failed = [line for line in page.lines if not line.passed]
    passed = [line for line in page.lines if line.passed]
    return environment().from_string(_TEMPLATE).render(page=page, failed=failed, passed=passed)


_TEMPLATE = """{% extends "base" %}
{% block title %}{{ page.table }} · {{ page.recipe }}{% endblock %}
{% block body %}
<header>
  <p class="eyebrow">{{ page.recipe }} · validation</p>
  <h1>{{ page.table }} <span class="badge {{ page.level }}">{{ page.verdict }}</span></h1>
  <ul class="facts">
    <li><b>{{ "{:,}".format(page.num_rows) }}</b> rows</li>
    <li><b>{{ page.lines|length }}</b> expectations</li>
    <li><b>{{ passed|length }}</b> hold</li>
    <li><b>{{ failed|length }}</b> fail</li>
  </ul>
</header>
{% if failed %}
<h2>What fails</h2>
{% for line in failed %}
<section class="card {{ line.severity }}">
  <h3><span class="badge {{ line.severity }}">{{ line.severity }}</span> <code>{{ line.column }}</code>
    {{ line.meaning }}</h3>
  {% if line.rule %}<p class="rule">{{ line.rule }}</p>{% endif %}
  {% if line.count %}<p><b>{{ "{:,}".format(line.count) }}</b> of {{ "{:,}".format(page.num_rows) }} rows.
    Found: {{ line.observed }}</p>{% elif line.observed %}<p>{{ line.observed }}</p>{% endif %}
  {% if line.ids %}<p class="ids">{% for id in line.ids %}<code>{{ id }}</code> {% endfor %}
    {% if line.count > line.ids|length %}… and {{ line.count - line.ids|length }} more{% endif %}</p>{% endif %}
</section>
{% endfor %}
{% endif %}
{% if passed %}
<h2>What holds</h2>
<table>
  <thead><tr><th>column</th><th>expectation</th><th>rule</th><th>severity</th></tr></thead>
  <tbody>
  {% for line in passed %}
  <tr><td><code>{{ line.column }}</code></td><td>{{ line.meaning }}</td><td class="rule">{{ line.rule }}</td>
    <td>{{ line.severity }}</td></tr>
  {% endfor %}
  </tbody>
</table>
{% endif %}
{% endblock %}
"""
