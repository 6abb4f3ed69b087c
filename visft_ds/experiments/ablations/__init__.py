"""Questions about the recipe, answered by experiments: what is run, collected and drawn for each."""
