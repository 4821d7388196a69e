"""Small data for the tests of this folder: documents, settings around them, and sources that are closed afterwards."""

from __future__ import annotations

WORDS = ["the", "still", "takes", "a", "wash", "and", "gives", "spirit", "def", "return", "yield", "oak", "0", "[x]"]
