"""The shared base of our static pages."""

import jinja2
import pytest

from evaluation.page_style import environment


def test_values_are_escaped_and_forgotten_names_raise():
    page = environment().from_string('{% extends "base" %}{% block body %}{{ text }}{% endblock %}')
    assert "&lt;b&gt;" in page.render(text="<b>")
    with pytest.raises(jinja2.UndefinedError):
        page.render()
