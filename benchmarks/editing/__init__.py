"""Every editing method on atlas's own counterfactuals, and where the time of an edit goes."""
