"""Matched comparisons: the same tokens in the same order for every recipe, several seeds.

    cells -> budgets -> training -> finished -> tables
    what to train; whether it is matched; one run a cell; one JSON file a finished cell; what they say

A finished cell holds its losses of every document, so a comparison can be made again, and checked, from
these files alone.
"""
