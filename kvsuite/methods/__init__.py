"""Compression methods: `parse` a name, `catalogue` what there is. One file each, under selectors, budgets, codecs."""

from kvsuite.methods.base import Budget, Codec, Method, Part, Selector
from kvsuite.methods.grammar import catalogue, names, parse, parse_all, part_class

__all__ = ["Budget", "Codec", "Method", "Part", "Selector", "catalogue", "names", "parse", "parse_all", "part_class"]
