"""A report as a page and as Markdown."""

import re

from evaluation.report_page import markdown, page

GATE = ("pass  loss/held_out = 0.8", "FAIL  vbench/scene: absent")


def test_markdown_has_metrics_with_intervals_and_links_the_sheet(report, tmp_path):
    text = markdown(report, GATE, tmp_path / "contact_sheet.png")
    assert "| vbench/temporal_flickering | 0.8600 | 0.8100 to 0.9100 |" in text
    assert "| loss/held_out | 0.8000 |  |" in text
    assert "- **vbench/scene**: no <weights>" in text
    assert "![Samples](contact_sheet.png)" in text
    assert "- FAIL  vbench/scene: absent" in text
    assert report.id in text
    assert "![Samples]" not in markdown(report, GATE, None)


def test_the_page_holds_its_picture_and_loads_nothing(report, tmp_path):
    sheet = tmp_path / "contact_sheet.png"
    sheet.write_bytes(b"\x89PNG")
    text = page(report, GATE, sheet)
    assert 'src="data:image/png;base64,iVBORw=="' in text
    assert not re.search(r"https?://|@import|<script|src=\"[^d]", text)
    assert "no &lt;weights&gt;" in text
    assert 'class="card critical"' in text
    assert "<img" not in page(report, GATE, None)
