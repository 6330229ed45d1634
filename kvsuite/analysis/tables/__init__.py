"""What is shown of a run or a comparison, as typed tables: one file for each idea. Nothing is drawn here."""
