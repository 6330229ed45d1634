"""Predictors learned from runs: throughput, and the length and type of answers; each beside nulls that know less."""
