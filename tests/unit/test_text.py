"""Text of other people, made fit to be shown."""

import sys
import unicodedata

from eagle.text import visible


def test_no_control_character_is_left_but_tabs_and_line_breaks():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {character for character in visible(everything) if unicodedata.category(character) in ("Cc", "Cs")}
    assert left == {"\t", "\n"}


def test_all_other_text_stays_as_it_is():
    text = "plain, 中文, العربية, naïve e\u0301, 👩‍👩‍👧, \u00a0\u2028 tabs\tand\nlines"
    assert visible(text) == text


def test_what_is_shown_in_its_place():
    assert visible("\x1b[31m\r\x07\x7f\x9b\ud800") == "␛[31m␍␇␡\\x9b\\ud800"
    visible("\ud800").encode()
