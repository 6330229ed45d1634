"""How much longer answers get."""
