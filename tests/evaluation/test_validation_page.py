"""The page about one table."""

from evaluation.validation_page import Line, Page, render


def test_failures_come_with_rows_and_the_ids_that_do_not_fit_are_counted():
    ids = tuple(f"id{i}" for i in range(20))
    bad = Line(False, "critical", "fps", "a plausible frame rate", ">= 1", 1234, "0, 0.5", ids)
    good = Line(True, "info", "path", "a value in every row", "", 0, "", ())
    text = render(Page("clips", "v2_0-tiny", "do not build on this table", "critical", 5000, [bad, good]))
    assert "<b>1,234</b> of 5,000 rows" in text
    assert "and 1214 more" in text
    assert text.index("What fails") < text.index("a plausible frame rate") < text.index("What holds")


def test_a_clean_table_has_no_failures_section():
    good = Line(True, "info", "path", "a value in every row", "", 0, "", ())
    assert "What fails" not in render(Page("clips", "v2_0-tiny", "everything holds", "passed", 1, [good]))
