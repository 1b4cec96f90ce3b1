"""Comes before everything that any test imports."""

from tests.cards import hide

hide()
