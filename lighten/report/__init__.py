"""Results and the reports made from them. Reads results only: nothing here measures, or loads a model."""
