"""What is learned from a run: predictors and the router, each beside those that know less."""
