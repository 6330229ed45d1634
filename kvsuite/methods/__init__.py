"""Compression methods: `parse` a name, `catalogue` what there is. One file each, under selectors, budgets, codecs,
readers."""

from kvsuite.methods.base import Budget, BudgetSelector, Codec, Component, Method, Reader, Selector
from kvsuite.methods.grammar import catalogue, component, names, parse, parse_all

__all__ = [
    "Budget", "BudgetSelector", "Codec", "Component", "Method", "Reader", "Selector",
    "catalogue", "component", "names", "parse", "parse_all",
]  # fmt: skip
